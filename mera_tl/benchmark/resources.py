"""What a run takes of a machine: threads, and memory to spare."""

import os

import psutil  # arrives with the accelerate that TransformerLens needs
import torch
from threadpoolctl import threadpool_limits

from mera_tl.models.model import Model

SMALL = 50_000_000
"""Parameters below which a second thread costs more than it brings."""
SPARE = 1 / 8
"""Share of the free memory that a run may fill with what it would else run again."""


def choose_threads(model: Model) -> int:
    """Give this process as many threads as the model is worth, and return how many.

    A small model's operators take microseconds: more threads spend their time waiting for each
    other, and beside another busy process they wait for their turn as well. `OMP_NUM_THREADS` is
    the last word.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    size = sum(weight.numel() for weight in model.hooked.parameters())
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(asked) if asked.isdigit() else 1 if size < SMALL else available or 1
    torch.set_num_threads(max(1, threads))
    threadpool_limits(max(1, threads), user_api="blas")
    return max(1, threads)


def free_memory(device: str, n_devices: int = 1) -> int:
    """Return the bytes that are free on a device now, on all of them where there are several."""
    if device.startswith("cuda"):
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(n_devices))
    return psutil.virtual_memory().available


def spare_memory(model: Model) -> int:
    """Return the bytes beside a loaded model that a run may fill and would not miss."""
    return int(SPARE * free_memory(str(model.device)))
