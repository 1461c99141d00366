"""How long does a change in the live explorer take?

Changes of every kind, as a reader would make them, to two prompts of a run: threshold up and down,
a fixed length, layers, tokens, direction, the next prompt, and back. Timed is everything that the
page waits for but the browser: the panel, its figures as JSON, and both replies; everything that is
run for the first time (a new prompt's unsteered answer and reply) counts. Expected: at most two
seconds for a model of 135 million parameters on one thread. A minute.

Found, on SmolLM2-135M-Instruct, prompts of 62 and 68 tokens, one thread of a quiet machine, 13
changes after the first prompt, on the clock: .65 s in the median and 1.06 at most, 1.35 for the
first. Before what a prompt begins with, both replies and earlier choices were run once only
(`smollm2-without-reuse`), in processor time: 1.04, 1.74 and 2.30.

    python -m experiments.live_changes RUN_FOLDER --name smollm2
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from mera_tl import storage
from mera_tl.live import Bench, Choices, open_bench, panel, replies

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem


def main(run: tyro.conf.Positional[Path], name: str, results: Path = RESULTS) -> None:
    """Time changes on the bench of a run, and keep them as NAME.jsonl."""
    torch.set_num_threads(1)
    bench, rows = open_bench(run=run), []
    for what, prompt, choices in changes(bench):
        started, cpu = time.perf_counter(), time.process_time()
        shown = panel(bench, prompt, choices)
        size = sum(len(str(f.to_json())) for f in (shown.bars, shown.layers, shown.tokens) if f)
        seen = time.perf_counter() - started
        said = replies(bench, prompt, choices)
        took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        took |= {"panel_seconds": seen}
        n_prompt = len(bench.model.tokenize([prompt])[0])
        rows.append(
            {"model": bench.model.name, "change": what, "n_prompt": n_prompt}
            | {key: round(value, 2) for key, value in took.items()}
            | {"kilobytes": size // 1000, "same_reply": said[0] == said[1]}
        )
        print(rows[-1])
    storage.write_records(results / f"{name}.jsonl", rows)
    for clock in ("seconds", "cpu"):
        took = sorted(row[clock] for row in rows[1:])
        print(f"{len(took)} changes, {clock}: median {took[len(took) // 2]}, worst {took[-1]}")


def changes(bench: Bench) -> Iterator[tuple[str, str, Choices]]:
    """Yield what is changed in words, and what the page then shows."""
    start, ways = bench.start, list(bench.ways)
    one, two = bench.prompts[:2]
    low, all_layers = replace(start, threshold=0.2), tuple(range(bench.model.n_layers))
    yield "first prompt", one, start
    yield "threshold .2", one, low
    yield "threshold .05", one, replace(start, threshold=0.05)
    yield "threshold .8", one, replace(start, threshold=0.8)
    yield "threshold .2 again", one, low
    yield "a fixed length", one, replace(start, rule="strength", strength=0.3)
    yield "all layers", one, replace(low, layers=all_layers)
    yield "every token", one, replace(low, positions="all")
    yield "the final token", one, replace(low, positions="final")
    yield f"direction {ways[1]}", one, replace(low, way=ways[1])
    yield f"direction {ways[-1]}", one, replace(low, way=ways[-1])
    yield "second prompt", two, low
    yield "threshold .05 there", two, replace(low, threshold=0.05)
    yield "back to the first", one, low


if __name__ == "__main__":
    tyro.cli(main)
