"""What is done with a saved steering: generate with it, evaluate it elsewhere, export it."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from mera_tl.cli import terminal
from mera_tl.cli.terminal import console


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A saved steering and the model that it is for."""

    steering: str
    """Folder that `decision.save` wrote, or one in a run's certificates/, or a name on the hub."""
    model: str
    """The model that it was certified on."""
    chat: bool = True
    """Prompts go into the tokenizer's chat template, where it has one; with --no-chat they are
    taken as they are written, control tokens that are typed in them included."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model; what was certified in one is refused in another."""
    engine: Literal["auto", "transformer_lens", "hugging_face"] = "auto"
    """What runs the forward passes: the same numbers to rounding; hugging_face decodes faster."""
    device: str | None = None
    """Device to run on, such as cuda:1. Default: cuda where there is one."""
    anyway: bool = False
    """Accept a model other than the certified one; nothing is certified for it."""
    json: bool = False
    """Print JSON."""

    def loaded(self) -> tuple[Any, Any]:
        """Return the model and the steering."""
        from mera_tl.certificate.saving import load_steering
        from mera_tl.models.loading import load_model

        model = load_model(
            self.model,
            dtype=self.dtype,
            device=self.device,
            chat=self.chat and None,  # None: where there is a template
            engine=self.engine,
        )
        return model, load_steering(self.steering, model=model, anyway=self.anyway)


@dataclass(frozen=True, kw_only=True)
class Generate(Carried):
    """Reply to prompts, unsteered and steered side by side.

    For example:

      $ mera generate "Is this spam ?" --steering spam-steering -m organism
      $ mera generate --steering spam-steering -m organism --file prompts.txt

    Tokens are coloured by predicted error, from green to red, and underlined where they were moved.
    """

    prompts: Positional[tuple[str, ...]] = ()
    """Prompts. Default: each line of standard input, or one after another as you type them."""
    file: Path | None = None
    """A file with a prompt on every line."""
    max_new_tokens: int = 64
    """Most tokens of a reply."""
    temperature: float = 0.0
    """0 takes the most likely token; both replies share their random numbers."""
    seed: int = 0
    """Random seed of the sampling."""

    def __call__(self) -> None:
        prompts = list(self.prompts)
        if self.file is not None:
            prompts += _lines(terminal.read_lines(self.file))
        is_typed = not prompts and sys.stdin.isatty()
        prompts = prompts or ([] if is_typed else _lines(sys.stdin))
        if not prompts and not is_typed:
            raise ValueError("There is no prompt; name one, or pass lines on standard input.")
        model, steering = self.loaded()
        for some in ([line] for line in _typed()) if is_typed else [prompts]:
            self._reply(model, steering, some)

    def _reply(self, model: Any, steering: Any, prompts: list[str]) -> None:
        from mera_tl.steering.generation import generate
        from mera_tl.steering.rules import Adaptive

        # The probe reads the unsteered reply too: the same steering, with no limit.
        reader = replace(steering, rule=Adaptive()).with_certificate(steering.certificate)
        unsteered, steered = (
            generate(
                model,
                prompts,
                each,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
            )
            for each in (reader, steering)
        )
        if self.json:
            names = ("unsteered", "steered")
            pairs = zip(unsteered, steered, strict=True)
            rows = [dict(zip(names, map(_plain, pair), strict=True)) for pair in pairs]
            return terminal.print_json(
                [{"prompt": p, **row} for p, row in zip(prompts, rows, strict=True)]
            )
        _print_replies(unsteered, steered)
        certificate = steering.certificate  # its second line says that it is not for any prompt
        said = "Nothing is certified for this model." if certificate is None else str(certificate)
        console().print(said, markup=False)
        return None


@dataclass(frozen=True, kw_only=True)
class Eval(Carried):
    """Run standard benchmarks unsteered and steered: the side effects of a steering.

    For example:

      $ mera eval --steering spam-steering -m organism -t my_task.yaml --limit 200

    Needs lm-evaluation-harness: pip install 'mera-tl[evals]'. `low` and `high` are a 95 % interval
    of the paired difference.
    """

    tasks: tuple[str, ...]
    """Names of its tasks, and paths of YAML task files."""
    limit: int | None = None
    """Examples per task. Default: all."""
    shots: int | None = None
    """Examples shown in every prompt. Default: the task's own number."""

    def __call__(self) -> None:
        from mera_tl.evals.comparing import compare_on_tasks

        model, steering = self.loaded()
        effects = compare_on_tasks(
            model, steering, self.tasks, limit=self.limit, n_shots=self.shots
        )
        rows = [asdict(effect) | {"difference": effect.difference} for effect in effects]
        if self.json:
            return terminal.print_json(rows)
        console().print(terminal.rich_table(rows))
        return None


@dataclass(frozen=True)
class Export:
    """Write a steering of fixed strength as a control vector for llama.cpp (GGUF).

    For example:

      $ mera export --steering additive-steering -o vector.gguf
    """

    steering: str
    """Folder that `decision.save` wrote, or one in a run's certificates/, or a name on the hub."""
    out: Path
    """The file to write."""
    architecture: str = "llama"
    """llama.cpp's name of the model's family."""

    def __call__(self) -> None:
        from mera_tl.certificate.saving import load_steering
        from mera_tl.steering.export import export_control_vector

        steering = load_steering(self.steering)
        print(export_control_vector(steering, self.out, architecture=self.architecture))


def _lines(lines: Iterable[str]) -> list[str]:
    return [line.rstrip("\n") for line in lines if line.strip()]


def _typed() -> Iterator[str]:
    """Ask for prompts until there is none."""
    with suppress(EOFError):
        while line := console().input("[bold]prompt>[/bold] ").strip():
            yield line


def _plain(reply: Any) -> dict[str, Any]:
    """Return a reply for scripts."""
    return {
        "text": reply.text,
        "tokens": reply.tokens,
        "log_probs": reply.log_probs,
        "ended": reply.is_ended,
        "n_prompt": reply.trace.n_prompt,
        "layers": reply.trace.layers,
        "predicted_error": reply.trace.predicted_error.tolist(),
        "shift": reply.trace.shift.tolist(),
    }


def _print_replies(unsteered: Sequence[Any], steered: Sequence[Any]) -> None:
    from rich.table import Column, Table

    for before, after in zip(unsteered, steered, strict=True):
        # Folded: a long word, or a text without spaces, would be cut off.
        sides = (Column(name, overflow="fold", ratio=1) for name in ("unsteered", "steered"))
        table = Table(*sides, expand=True)
        table.add_row(_coloured(before), _coloured(after))
        console().print(before.prompt, markup=False)
        console().print(table)
        console().print(_where(after.trace), markup=False)


def _coloured(reply: Any) -> Any:
    """Return the reply's tokens, each as red as the highest error that a layer predicts."""
    import numpy as np
    from rich.text import Text

    text, trace = Text(), reply.trace
    for token, error, shift in zip(
        trace.tokens[trace.n_prompt :],
        trace.predicted_error.T[trace.n_prompt :],
        trace.shift.T[trace.n_prompt :],
        strict=True,
    ):
        style = ""
        if not np.isnan(error).all():
            red = round(255 * float(np.nanmax(error)))
            style = f"rgb({red},{255 - red},80)" + (" underline" if np.nanmax(shift) > 0 else "")
        text.append(token if text else token.lstrip(), style=style)
    return text


def _where(trace: Any) -> str:
    """Say in a sentence what was moved."""
    moved = trace.shift > 0
    if not moved.any():
        return "Nothing was moved."
    layers = [layer for layer, row in zip(trace.layers, moved, strict=True) if row.any()]
    in_prompt = int(moved[:, : trace.n_prompt].any(0).sum())
    s = "s" * (in_prompt != 1)
    several = f"{len(layers)} layers ({layers[0]} to {layers[-1]})"
    return (
        f"Moved {in_prompt} token{s} of the prompt and {int(moved.any(0).sum()) - in_prompt} of "
        f"the reply, in {several if len(layers) > 1 else f'layer {layers[0]}'}, by up to "
        f"{float(trace.shift[moved].max()):.2f} of the activation's length."
    )
