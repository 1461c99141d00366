"""What one run is: model, task, splits, scope, certificate. Plain values, no heavy imports.

`check` is the one place where the value of an option is judged, whoever made it: these dataclasses,
the command line or a file. What depends on the model or the data is judged when they are loaded.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from mera_tl.inference.progress import seconds_of
from mera_tl.tasks import splitting

SpaceName = Literal["raw", "sae"]
DEFAULT_METHODS = ("no_steering", "optimal_probe", "flip", "searched")
REPLY_METHODS = (
    "no_steering",
    "prompt_steering",
    "retry",
    "best_of_k",
    "best_of_k_scorer",
    "reply_contrast",
    "instruction",
)
"""What is compared on a scored task unless methods are named."""
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


@dataclass(frozen=True, kw_only=True, repr=False)
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
    """Steered layers: all, best, or numbers (0,2-4); methods that search choose their own."""
    sae: str | None = None
    """SAEs of --space sae: a folder, RELEASE:layer_{layer}/ID, or "organism". Default: the
    organism's own, else saes/<model>, where `mera sae train` writes."""
    sae_sibling: bool = False
    """Use the SAEs of a base model on its instruction-tuned sibling."""
    sae_correction: Literal["none", "gain"] = "none"
    """Rescale latent shifts so that re-encoding the edited activation recovers them to first order
    (gain)."""
    positions: Literal["all", "last", "final", "generated"] = "all"
    """Steered tokens: all, from the final prompt token on (last), that token alone (final), or
    generated ones; methods that search choose their own."""
    probe_position: Literal["last", "exact"] = "last"
    """Where probes read: the final prompt token, or the answer token."""
    min_gain: float = 0.0
    """Gain in accuracy to certify, such as 0.02 for two points (the paper's epsilon)."""
    delta: float = 0.05
    """Greatest probability of steering with a gain below `min_gain`."""
    metric: Literal["correct", "error"] = "correct"
    """What must improve: accuracy, or the error 1 - P(true option)."""
    thresholds: str = "default"
    """Thresholds that MERA's rule may steer at: default (ten from .001 to .7; the paper's methods
    have the paper's), paper (ten from .001 to .99), or numbers (0.1,0.3). Each costs confidence."""
    primary: str | None = None
    """Method that gets all of delta, the others nothing. Default: the methods of a run share it,
    `searched` getting half."""
    max_regressions: float | None = None
    """Greatest share of answers that steering may turn from right to wrong, certified together with
    the gain. Default: not asked for."""
    max_risk: float = 0.05
    """Greatest share of wrong answers among those that `withhold` gives."""
    bound: Literal["unconditional", "mcnemar", "betting", "hoeffding"] | None = None
    """Test behind the certificate. Default: unconditional for correct, betting for error."""
    probe_penalty: float | None = None
    """Penalty of the ridge probe, as a multiple of the mean feature variance. Default: 3."""
    search_budget: str | None = None
    """Time after which a search takes the best so far, such as 90s, 10m or 2h, counted over all
    attempts. Default: none."""
    strength: float = 0.1
    """Shift length of the additive methods, as a multiple of the layer's median residual norm."""
    pairs: int = 0
    """Examples with most and with least error that a contrastive probe compares (the paper: 50, 100
    or 200). Default: half of the examples each."""
    readout: Literal["options", "last", "exact", "exact_anywhere"] = "options"
    """How answers are read: score every option whole (options), read the final prompt token (last),
    or decode a reply that begins with an option (exact) or contains one (exact_anywhere)."""
    answer_prefix: str | None = None
    """Text that begins the assistant's turn of a chat, such as "Answer:", which is the default for
    readout options; the others have none."""
    max_new_tokens: int = 8
    """Tokens decoded at most before an example counts as unanswered."""
    reply_tokens: int = 40
    """Tokens decoded at most of a reply that is scored."""
    trust_task_code: bool = False
    """Let the scorer of a task file be Python code beside it, and run it."""
    truncate: bool = False
    """Shorten the text of prompts that exceed the context, never the question."""
    free_text: int = 0
    """Number of test prompts to continue with free generation, to measure perplexity and repetition
    (0: off)."""
    other_tasks: str | None = None
    """Other tasks (with commas between), 30 prompts of each of which are also answered under every
    steering: what does it do to them? Default: none."""
    batch_size: int | None = None
    """Prompts per batch. Default: as many as --batch-tokens hold."""
    batch_tokens: int = 2048
    """Tokens per batch, padding counted; halved by itself when memory runs out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model; probes and shifts are always float32."""
    device: str | None = None
    """Device to run on, such as cuda:1. Default: cuda where there is one."""
    n_devices: int = 1
    """GPUs to spread the model's layers over."""
    engine: Literal["auto", "transformer_lens", "hugging_face"] = "auto"
    """What runs the forward passes: the same numbers to rounding; hugging_face decodes faster."""
    chat: bool = True
    """Prompts go into the tokenizer's chat template, where it has one; with --no-chat they are
    taken as they are written, control tokens that are typed in them included."""
    system: str | None = None
    """System prompt, for a model with a chat template. Default: the template's own."""

    def __post_init__(self) -> None:
        check(self)

    def __repr__(self) -> str:
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        told = {f.name: told[f.name] for f in fields(self) if told[f.name] != f.default}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in told.items())})"


@dataclass(frozen=True, kw_only=True, repr=False)
class RunConfig(RunOptions):
    """One model on one task, with one split."""

    model: str
    """An official name, a local Hugging Face folder, or "organism"."""
    task: str
    """A task's name (`mera tasks`), or the path of a task file (.toml, .yaml)."""
    space: SpaceName = "raw"
    """Where probes read and rules write: the residual stream, or the latents of SAEs."""
    seed: int = 0
    """Random seed of the data split, the cross-validation folds and the example order."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for config.json and its fingerprint."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class GridConfig(RunOptions):
    """Models x tasks x seeds, every method on each: one record per job."""

    models: tuple[str, ...]
    """Models, each as `mera run` takes it."""
    tasks: tuple[str, ...]
    """Tasks, each as `mera run` takes it."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare (`mera methods` lists them)."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds, each as `mera run` takes it."""
    spaces: tuple[SpaceName, ...] = ("raw",)
    """Spaces to compare: raw, sae."""

    def runs(self) -> list[RunConfig]:
        """Return one configuration per model, task, seed and space, models outermost."""
        shared = vars(narrow(self, RunOptions))
        return [
            RunConfig(model=model, task=task, seed=seed, space=space, **shared)
            for model, task, seed, space in product(
                self.models, self.tasks, self.seeds, self.spaces
            )
        ]


Options = TypeVar("Options")


def narrow(options: Any, kind: type[Options]) -> Options:
    """Return a dataclass of another kind, with what the options say of its fields."""
    names = [f.name for f in fields(kind) if hasattr(options, f.name)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: getattr(options, name) for name in names})


# --- checks -------------------------------------------------------------------------------------

MOST_LAYERS = 1000
"""No model has more; a range is checked before it is expanded."""


def parse_layers(text: str) -> Any:
    """Turn "all", "best" or "0,2-4" into what `Steering` takes.

    Raises:
        ValueError: if the text is none of these, or names a layer twice.
    """
    if text in ("all", "best"):
        return text
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_LAYERS:
            raise ValueError(
                f'layers={text!r} is not "all", "best" or numbers below {MOST_LAYERS}, such as '
                "0,2-4."
            )
        layers.extend(range(first, last + 1))
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers={text!r} names a layer twice; give each layer once.")
    return tuple(layers)


def parse_tasks(text: str | None) -> tuple[str, ...]:
    """Read names of tasks with commas between; none for None.

    Raises:
        ValueError: if one is empty or there twice.
    """
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"other_tasks={text!r} holds a name twice, or an empty one; give names of tasks with "
            "commas between, each once."
        )
    return names


def parse_thresholds(text: str) -> tuple[float, ...]:
    """Turn "default", "paper" or "0.1,0.3" into thresholds.

    Raises:
        ValueError: if the text is none of these.
    """
    # Imported here: it needs scipy, which `mera --help` does not wait for.
    from mera_tl.certificate.terms import DEFAULT_THRESHOLDS, PAPER_THRESHOLDS

    named = {"default": DEFAULT_THRESHOLDS, "paper": PAPER_THRESHOLDS}
    if text in named:
        return named[text]
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(0 < t < 1 for t in found):
        raise ValueError(
            f"thresholds={text!r} is not default, paper or different numbers between 0 and 1, "
            "such as 0.1,0.3."
        )
    return found


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: low < value < high


def _from(low: int, most: int = 10**9) -> Callable[[Any], bool]:
    return lambda value: low <= value <= most


_COUNT, _COUNT_OR_0 = (_from(1), "1 or more"), (_from(0), "0 or more")
_SHARE = (_between(0.0, 1.0), "a number between 0 and 1, such as 0.05")
_SEED = (_from(0, 2**32 - 1), "a whole number from 0 to 4294967295")
_TEXT = (lambda text: bool(str(text).strip()), "a name or a path, not blank")
_POSITIVE = (_between(0.0, math.inf), "a finite number above 0")
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("model", "task", "data_dir", "template", "sae", "primary", "system"), _TEXT),
    "prompt": (lambda text: bool(text.strip()), "a text, not blank"),
    **dict.fromkeys(("delta", "power", "max_regressions", "max_risk"), _SHARE),
    **dict.fromkeys(("min_gain", "floor"), (_between(-1.0, 1.0), "a gain between -1 and 1")),
    "gain": (lambda gain: 0 < gain <= 1, "a gain above 0, at most 1, as 0.06 for six points"),
    "base_risk": (lambda risk: 0 < risk < 1, "a share of wrong answers between 0 and 1"),
    "base": (lambda base: 0 <= base < 1, "an accuracy from 0 to below 1"),
    **dict.fromkeys(("strength", "probe_penalty", "sparsity"), _POSITIVE),
    **dict.fromkeys(("pairs", "free_text", "row", "shots"), _COUNT_OR_0),
    "temperature": (lambda t: 0 <= t < math.inf, "0 or a finite number above"),
    "port": (_from(0, 2**16 - 1), "a port up to 65535, or 0 for a free one"),
    **dict.fromkeys(
        ("batch_size", "batch_tokens", "max_new_tokens", "reply_tokens", "n_thresholds", "limit"),
        _COUNT,
    ),
    **dict.fromkeys(("n_devices", "expansion", "k", "n_steps"), _COUNT),
    **dict.fromkeys(("step_tokens", "max_tokens"), _COUNT),
    "shards": (_from(1, 100_000), "from 1 to 100,000"),
    "gpus": (lambda n: 0 <= n <= 1024, "0 or more"),
    "seed": _SEED,
    "device": (
        lambda text: bool(re.fullmatch(r"cpu|mps|cuda(:\d+)?", text)),
        "cpu, mps, cuda or cuda:N",
    ),
}
"""For options of these names: what must hold, and how a message says it."""
FREE = ("pilot", "prompts", "runs")
"""Options that may be empty, or name something twice."""


def check(options: Any) -> None:
    """Judge every option of a dataclass by its type, its choices and the rule of its name.

    Raises:
        ValueError: naming the first option that means nothing, its value, and what it may be.
    """
    values = {option.name: getattr(options, option.name) for option in fields(options)}
    for option in fields(options):
        value, kinds = values[option.name], _kinds(option.type)
        if value is None and type(None) in kinds:
            continue
        listed = isinstance(value, tuple)
        for each in value if listed else (value,):
            inside = [k for kind in kinds for k in (get_args(kind) if listed else (kind,))]
            _check_one(option.name, each, [k for k in inside if k is not ...])
        if listed and (not value or len(set(value)) < len(value)) and option.name not in FREE:
            fault = "names one twice" if value else "is empty"
            raise ValueError(f"{option.name}={value!r} {fault}; give at least one, each once.")
    if values.get("primary") not in (None, *values.get("methods", (values.get("primary"),))):
        raise ValueError(
            f"primary={values['primary']!r} is none of the methods {', '.join(values['methods'])}; "
            "name one of them."
        )
    if "layers" in values:
        parse_layers(values["layers"])
        parse_thresholds(values.get("thresholds", "default"))
        splitting.read_wishes({role: values.get(role) for role in splitting.SHARES})
        if values.get("search_budget") is not None:
            seconds_of(values["search_budget"])
        parse_tasks(values.get("other_tasks"))
        if values.get("metric") == "error" and values.get("bound") in ("unconditional", "mcnemar"):
            raise ValueError(
                f"bound={values['bound']!r} counts correct answers and the metric is 'error'; "
                "pass betting or hoeffding."
            )
        if values.get("metric") == "error" and values.get("max_regressions") is not None:
            raise ValueError(
                "max_regressions counts answers that become wrong and the metric is 'error'; pass "
                "metric correct."
            )
        if values.get("system") is not None and not values.get("chat", True):
            raise ValueError("system is a prompt for a chat template; pass it without --no-chat.")


def _kinds(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    is_union = get_origin(kind) is not None and type(None) in get_args(kind)
    return get_args(kind) if is_union else (kind,)


def _check_one(name: str, value: Any, kinds: list[Any]) -> None:
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and value not in choices:
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(str, choices))}.")
    if not choices and not any(_is(value, kind) for kind in kinds):
        named = [getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None)]
        wanted = " or ".join(named) + f", as {str(value)!r}" * (str in kinds and _is(value, int))
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give {wanted}.")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name}={value!r} is not a number; give one.")
    name = {"seeds": "seed", "models": "model", "tasks": "task"}.get(name, name)
    ruled = name in RULES and (RULES[name] is _TEXT or not isinstance(value, Path))
    if ruled and not RULES[name][0](value):
        raise ValueError(f"{name}={value!r} is not {RULES[name][1]}.")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise ValueError(f"{name}={value!r} has a character that no name and no path may have.")


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and type(value) is not bool
    return not isinstance(kind, type) or isinstance(value, kind)
