"""Jobs in this process and on a real Ray cluster of several nodes give the same records."""

import os
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import SMALL, timeless, write_task

from mera_tl.benchmark import GridConfig, RunConfig, cluster, collect_shards, open_run, run_grid


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


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of a head that runs no job and two nodes of one core each."""
    ray = pytest.importorskip("ray", reason="the extra mera-tl[cluster] is not installed")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # on a busy machine workers would starve
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@contextmanager
def a_node_dies(nodes, when):
    """Add a second node, and kill it without warning as soon as `when` is true."""
    doomed, shots = nodes.add_node(num_cpus=1), []

    over = threading.Event()

    def kill():
        while not over.wait(0.05):
            if when():
                nodes.remove_node(doomed, allow_graceful=False)
                shots.append(time.time())
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert shots


def test_a_node_killed_in_mid_run_costs_nothing(nodes, checkpoints, tmp_path):
    config = GridConfig(
        models=(str(checkpoints["llama"]),),
        tasks=(write_task(tmp_path),),
        seeds=(0, 1, 2),
        methods=("no_steering", "additive_probe", "optimal_probe"),
        **SMALL,
    )
    plain = run_grid(config, tmp_path / "plain")
    folder = tmp_path / "ray"
    with a_node_dies(nodes, when=lambda: list(folder.glob("*/config.json"))):
        records = run_grid(config, folder, ray=nodes.address)
    assert timeless(records) == timeless(plain)


def test_a_node_killed_while_it_collects_costs_a_shard(nodes, checkpoints, tmp_path):
    task, folder = write_task(tmp_path), tmp_path / "ray" / "activations"
    config = RunConfig(model=str(checkpoints["llama"]), task=task, device="cpu", batch_tokens=60)
    with open_run(config, tmp_path / "plain") as run:
        assert len(run.activations.outcomes) == 36
    with (
        open_run(config, folder.parent) as run,
        a_node_dies(nodes, when=lambda: list(folder.glob("shards/*/manifest.json"))),
    ):
        collect_shards(run, 6, ray=nodes.address)
    for path in (tmp_path / "plain" / "activations").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
