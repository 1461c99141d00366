"""Jobs in this process and on a real Ray cluster of several nodes give the same records."""

import sys
import time

import pytest
from test_cli import write_task
from test_grid import timeless

from mera_tl import cluster
from mera_tl.config import GridConfig
from mera_tl.grid import run_grid


def halve(number: int) -> float:
    if number == 3:
        raise ValueError("three is odd")
    return number / 2


def test_jobs_here_yield_results_and_exceptions():
    found = dict(cluster.map_jobs(halve, [2, 3, 4]))
    assert (found[0], found[2]) == (1.0, 2.0)
    assert isinstance(found[1], ValueError)


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"mera-tl\[cluster\]"):
        list(cluster.map_jobs(halve, [2], ray="local"))


@pytest.fixture
def nodes():
    """A Ray cluster of a head that runs no job and two nodes of one core each."""
    ray = pytest.importorskip("ray", reason="the extra mera-tl[cluster] is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False)
    yield made, workers
    ray.shutdown()
    made.shutdown()


def test_a_node_killed_in_mid_run_costs_nothing(nodes, checkpoints, tmp_path):
    import threading

    made, workers = nodes
    config = GridConfig(
        models=(str(checkpoints["llama"]),),
        tasks=(write_task(tmp_path),),
        seeds=(0, 1, 2),
        methods=("no_steering", "additive_probe", "optimal_probe"),
        train="30",
        calibration="15",
        test="15",
    )
    plain = run_grid(config, tmp_path / "plain", progress=False)
    folder, shots = tmp_path / "ray", []

    def kill_when_busy():
        for _ in range(1200):
            if list(folder.glob("*/config.json")):  # a job is under way on some node
                made.remove_node(workers[0], allow_graceful=False)
                shots.append(time.time())
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_when_busy)
    killer.start()
    records = run_grid(config, folder, ray=made.address, progress=False)
    killer.join()
    assert shots
    assert timeless(records) == timeless(plain)
