"""What one run is: model, task, splits, scope, certificate. Plain values, no heavy imports."""

from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any, Literal

SpaceName = Literal["raw", "sae"]
DEFAULT_METHODS = ("no_steering", "optimal_probe", "flip", "searched")
DEMO_TASKS = ("spam_cue", "sentiment_fan", "sentiment_noise")
DEMO_METHODS = (
    "no_steering",
    "prompt_steering",
    "additive_probe",
    "vanilla_contrastive",
    "optimal_probe",
    "optimal_logistic_probe",
    "flip",
    "searched",
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All that runs of a grid share."""

    data_dir: str | None = None
    """Folder with the task's data: plain files, or a save_to_disk folder. Default: the hub."""
    template: str | None = None
    """File with another wording of the prompt; fields in braces are the task's columns."""
    train: str | None = None
    """Training examples: a count (600) or rows of the source (0-599,700-799). Default: 60 %."""
    calibration: str | None = None
    """Calibration examples, likewise. Default: 20 %."""
    test: str | None = None
    """Test examples, likewise. Default: 20 %."""
    layers: str = "all"
    """Steered layers: all, best, or numbers (0,2-4)."""
    sae: str | None = None
    """SAEs of --space sae: a folder, RELEASE:layer_{layer}/ID, or "organism". Default: the
    organism's own, else saes/<model>, where `mera sae train` writes."""
    sae_sibling: bool = False
    """Use the SAEs of a base model on its instruction-tuned sibling."""
    sae_correction: Literal["none", "gain"] = "none"
    """Stretch shifts of latents so that, to first order, re-encoding finds them again (gain)."""
    positions: Literal["all", "last", "generated"] = "all"
    """Steered tokens: all, from the final prompt token on (last), or generated ones."""
    probe_position: Literal["last", "exact"] = "last"
    """Where probes read: the final prompt token, or the answer token."""
    min_gain: float = 0.0
    """Gain to certify (the paper's epsilon)."""
    delta: float = 0.05
    """Greatest probability of steering with a gain below `min_gain`."""
    metric: Literal["correct", "error"] = "correct"
    """What must improve: accuracy, or the error 1 - P(true option)."""
    strength: float = 0.1
    """Of fixed-strength methods, in units of the layer's typical residual norm."""
    pairs: int = 0
    """Examples with most and with least error that a contrastive probe compares (the paper: 50, 100
    or 200). Default: half of the examples each."""
    readout: Literal["exact", "last"] = "exact"
    """Read the decoded answer token, or the final prompt token alone."""
    max_new_tokens: int = 8
    """Tokens decoded at most before an example counts as unanswered."""
    truncate: bool = False
    """Shorten the text of prompts that exceed the context, never the question."""
    free_text: int = 0
    """Test prompts to continue freely, for perplexity and repetition under each method."""
    batch_size: int | None = None
    """Prompts per batch. Default: as many as --batch-tokens hold."""
    batch_tokens: int = 2048
    """Tokens per batch, padding counted; halved by itself when memory runs out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model; probes and shifts are always float32."""
    device: str | None = None
    """Default: cuda where there is one."""
    n_devices: int = 1
    """GPUs to spread the model's layers over."""
    engine: Literal["auto", "transformer_lens", "hugging_face"] = "auto"
    """What runs the forward passes: the same numbers to rounding; hugging_face decodes faster."""
    chat: bool = False
    """Wrap prompts in the tokenizer's chat template."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunOptions):
    """One model on one task, with one split."""

    model: str
    """An official name, a local Hugging Face folder, or "organism"."""
    task: str
    """A task's name (`mera tasks`), or the path of a task file (.toml, .yaml)."""
    space: SpaceName = "raw"
    """Where probes read and rules write: the residual stream, or the latents of SAEs."""
    seed: int = 0
    """Of the split, the probes' folds and the order of the betting bound."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for config.json and its fingerprint."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GridConfig(RunOptions):
    """Models x tasks x seeds, every method on each: one record per job."""

    models: tuple[str, ...]
    """Models, each as `mera run` takes it."""
    tasks: tuple[str, ...]
    """Tasks, each as `mera run` takes it."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare (`mera methods` lists them)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the split."""
    spaces: tuple[SpaceName, ...] = ("raw",)
    """Spaces to compare: raw, sae."""

    def runs(self) -> list[RunConfig]:
        """Return one configuration per model, task, seed and space, models outermost."""
        shared = {f.name: getattr(self, f.name) for f in fields(RunOptions)}
        return [
            RunConfig(model=model, task=task, seed=seed, space=space, **shared)
            for model, task, seed, space in product(
                self.models, self.tasks, self.seeds, self.spaces
            )
        ]


def parse_layers(text: str) -> Any:
    """Turn "all", "best" or "0,2-4" into what `Steering` takes.

    Raises:
        ValueError: if the text is none of these.
    """
    if text in ("all", "best"):
        return text
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f'layers={text!r} is not "all", "best" or numbers such as 0,2-4.')
        layers.extend(range(int(first), int(last or first) + 1))
    return tuple(layers)
