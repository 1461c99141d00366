"""What does loading a real model cost beside `from_pretrained`, and what memory does a run need?

Each in a process of its own, everything imported before the clock starts: `from_pretrained` with
its tokenizer; both engines, once with an empty cache (the check against the original and the hash
of the weights are paid) and once more. Memory is the peak beyond what the imports held and beyond
the weights themselves, after loading and after 16 prompts. Expected: loading again at most twice
`from_pretrained`, at most 1 GB beyond the weights. Three minutes.

    python -m experiments.loading runs/models/smollm2 --data-dir data
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from mera_tl import storage

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
WAYS = ("from_pretrained", "hugging_face", "transformer_lens")
CHILD = """
import json, resource, sys, time
import torch, transformers, transformer_lens
import mera_tl
from mera_tl.inference import ReadSettings
way, path, data = sys.argv[1:]
organism = mera_tl.load_model("organism", engine="auto" if way == "from_pretrained" else way)
task = mera_tl.load_task("sms_spam", data_dir=data).subset(range(16))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started, cpu = peak(), time.perf_counter(), time.process_time()
if way == "from_pretrained":
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    transformers.AutoTokenizer.from_pretrained(path)
else:
    model = mera_tl.load_model(path, engine=way)
took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
hooked = model if way == "from_pretrained" else model.hooked
n_bytes = {weight.data_ptr(): weight.nbytes for weight in hooked.parameters()}
weights = sum(n_bytes.values()) / 2**20
took |= {"weights_mib": weights, "loading_mib": peak() - before - weights}
if way != "from_pretrained":
    mera_tl.evaluate(model, task, settings=ReadSettings(progress=False))
    took["answering_mib"] = peak() - before - weights
print(json.dumps({name: round(value, 2) for name, value in took.items()}))
"""


def main(model: tyro.conf.Positional[Path], data_dir: Path, results: Path = RESULTS) -> None:
    """Load a local model in every way, twice, and keep what it took."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "MERA_CACHE": cache}
        rows = []
        for again in (False, True):
            for way in WAYS:
                command = [sys.executable, "-W", "ignore", "-c", CHILD, way, model, data_dir]
                done = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                told = json.loads(done.stdout.splitlines()[-1])
                rows.append({"model": model.name, "way": way, "again": again, **told})
                print(rows[-1])
    storage.write_records(results / f"{model.name}.jsonl", rows)


if __name__ == "__main__":
    tyro.cli(main)
