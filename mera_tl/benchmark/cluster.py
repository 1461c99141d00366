"""Run jobs one after another in this process, or on a Ray cluster.

A job is a value and the function that does it is importable, so a job can be sent anywhere and be
done again: a worker that is lost costs the job it was at. Jobs leave their results in files under
a folder that all nodes see; what comes back is small.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

RETRIES = 3
"""How often a job is started again when its worker or node is lost."""


def map_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    ray: str | None = None,
    gpus: float = 0.0,
) -> Iterator[tuple[int, Result | Exception]]:
    """Yield each job's place and its result, or the exception that ended it, as they come.

    `ray` is None for this process, "local" for a cluster of this machine's cores, "auto" for the
    cluster this machine belongs to, or the address of one. `gpus` is what each job asks for.

    Raises:
        ValueError: if Ray is asked for and not installed, or there is no such cluster.
    """
    if ray is not None:
        yield from _on_ray(function, jobs, ray, gpus)
        return
    for place, job in enumerate(jobs):
        try:
            yield place, function(job)
        except Exception as error:  # the caller decides; the other jobs go on
            yield place, error


def _on_ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], address: str, gpus: float
) -> Iterator[tuple[int, Result | Exception]]:
    ray = _connect(address)
    # Ray keeps worker processes for the next task of the same function, and with them what that
    # function has loaded.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(function)
    waiting = {remote.remote(job): place for place, job in enumerate(jobs)}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        for reference in done:
            try:
                yield waiting[reference], ray.get(reference)
            except Exception as error:
                yield waiting[reference], error
            del waiting[reference]


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError(
            "Ray is not installed; `pip install mera-tl[cluster]`, or leave --ray out to run in "
            "this process."
        ) from None
    if ray.is_initialized():
        return ray
    try:
        if address == "local":
            ray.init(include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"There is no Ray cluster at {address!r} ({str(error).splitlines()[0]}); start one "
            "with `ray start --head`, or pass --ray local."
        ) from None
    return ray
