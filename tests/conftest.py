"""Tiny real models: one random Hugging Face checkpoint per family, written to disk once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import csv
import json
import logging
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# Hashes and load checks are kept for the length of a test run, not in the user's cache.
os.environ["MERA_CACHE"] = tempfile.mkdtemp(prefix="mera-cache-")

LONG_FILES = (
    "test_demo",
    "test_bad_input",
    "test_many",
    "test_grid",
    "test_cluster",
    "test_report",
    "test_quickstart",
    "test_cli",
    "test_live",
)
"""Begin first, so that no worker is left alone with one of them at the end."""

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2")
SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = """the a is this that good bad red blue green it was not very film bird tree spam ham yes no
positive negative question answer : ? . , one two three four five six seven eight nine ten
""".split()  # noqa: SIM905


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GPT2 = dict(
    vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


def _config(family: str):
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

    if family == "llama":  # grouped-query attention, llama3 rope, tied embeddings
        return LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True)
    if family == "qwen2":
        return Qwen2Config(**SHAPE)
    if family == "gemma2":  # soft caps, and a sliding window shorter than the prompts
        return Gemma2Config(
            **SHAPE,
            head_dim=8,
            sliding_window=4,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        )
    return GPT2Config(**GPT2)


def save_random_checkpoint(config, folder: Path) -> Path:
    """Write a random checkpoint whose norms and biases are not trivial."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.15))
            del name
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    # The folders carry misleading names on purpose: only config.json may count.
    names = {"llama": "gpt2", "qwen2": "Llama-3.2-1B", "gemma2": "qwen", "gpt2": "gemma-2-2b"}
    base = tmp_path_factory.mktemp("checkpoints")
    return {
        family: save_random_checkpoint(_config(family), base / name)
        for family, name in names.items()
    }


@pytest.fixture(scope="session")
def models(checkpoints):
    from mera_tl.models import load_model

    return {family: load_model(str(path), device="cpu") for family, path in checkpoints.items()}


@pytest.fixture(scope="session", params=FAMILIES)
def model(request, models):
    return models[request.param]


def original(path):
    """What transformers makes of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def padded(prompts, side: str = "left"):
    """Tokens and mask of prompts of unequal length."""
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(prompt) for prompt in prompts]
    stack = partial(pad_sequence, batch_first=True, padding_side=side)
    return stack(rows), stack([torch.ones_like(row) for row in rows])


@cache
def organism():
    """The embedded model, loaded once; a test that changes it loads its own."""
    from mera_tl.models import load_model

    return load_model("organism", device="cpu")


def run_in(folder, config, methods):
    """Leave a run's records in a folder."""
    from mera_tl.benchmark import open_run

    with open_run(config, folder) as run:
        list(run.records(methods))
    return folder


def make_outcomes(options, labels, predictions, probs, **more):
    """Outcomes of a run that steered nothing and read nothing."""
    from mera_tl.inference import Outcomes

    n, none = len(labels), torch.zeros(len(labels), dtype=torch.long)
    counts = dict.fromkeys(("n_steered", "n_steerable", "n_tokens", "n_layers"), none)
    told = {"shift": torch.zeros(n), "max_score": torch.full((n,), -torch.inf)} | counts | more
    return Outcomes(tuple(options), torch.arange(n), labels, predictions, probs, **told)


def make_task(n: int = 24, *, seed: int = 0, options=("yes", "no"), name: str = "toy"):
    """Random prompts of unequal length; labels are random too: the models know nothing."""
    from mera_tl.tasks import Example, Task

    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(n):
        length = int(torch.randint(1, 14, (1,), generator=generator))
        words = [WORDS[i] for i in torch.randint(0, 20, (length,), generator=generator).tolist()]
        label = int(torch.randint(0, len(options), (1,), generator=generator))
        text = " ".join(words)
        prompt = f"question : {text} {row % 10} ? answer :"
        examples.append(Example(row, prompt, tuple(options), label, text))
    return Task(name, tuple(examples), "all")


@pytest.fixture
def task():
    return make_task()


def write_task(folder, *, labels=None, name="toy", extra="", rows=60, options=("yes", "no")):
    """A user's own task: a CSV and a TOML file."""
    task = make_task(60)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        for i, example in enumerate(task.examples[:rows]):
            label = (labels or options)[example.label] if labels != "one" else "yes"
            writer.writerow([f"{example.text} {'red ' * (i % 5)}{i}", label])
    (folder / f"{name}.toml").write_text(
        f'options = {json.dumps(options)}\ndata = "{name}.csv"\ntext = "text"\n'
        f'template = "question : {{text}} ? answer :"\n{extra}',
        encoding="utf-8",
    )
    return str(folder / f"{name}.toml")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("toy"))


def change_one_bit(weights: Path):
    """Change one bit of one neuron; names and sizes are the same."""
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)


SMALL: dict = {"train": "30", "calibration": "15", "test": "15"}
"""Splits of such a task."""


def timeless(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def arguments(checkpoints, toy, out, **changes):
    options = {"model": checkpoints["llama"], "task": toy, "out": out} | SMALL | changes
    return [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]


def python(code: str, *, flags=(), arguments=(), **options):
    """Run code in a process of its own; what it printed is returned."""
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def call_mera(monkeypatch, *arguments):
    """Run the command in this process; return its exit code."""
    from mera_tl.cli import app

    monkeypatch.setattr(sys, "argv", ["mera", *map(str, arguments)])
    try:
        app.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(autouse=True)
def unlogged():
    """The command sets up logging for its whole process; no other test is to notice."""
    for name in ("mera_tl", "mera_tl.tasks", "mera_tl.steering.directions"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def mera(monkeypatch, capsys):
    """The command in this process: its exit code is checked, what it printed returned."""

    def call(*arguments, code=0):
        assert call_mera(monkeypatch, *arguments) == code
        return capsys.readouterr()

    return call


def mixed_options(model) -> tuple[str, str]:
    """Two words between which a random model is of two minds, prompt by prompt."""
    from itertools import combinations

    prompts = model.tokenize([example.prompt for example in make_task(16).examples])
    rows = [torch.tensor([tokens]) for tokens in prompts]
    logits = torch.cat([model.next_token_logits(t, torch.ones_like(t)) for t in rows])
    ids = {word: model.tokenizer.convert_tokens_to_ids(word) for word in WORDS[:20]}
    share = {
        (a, b): (logits[:, ids[a]] > logits[:, ids[b]]).float().mean().item()
        for a, b in combinations(ids, 2)
    }
    return min(share, key=lambda pair: abs(share[pair] - 0.5))


def spoken_options(model, task) -> tuple[str, str]:
    """Two words that a random model says by itself: at once in some rows, later, or never."""
    from itertools import combinations

    replies = []
    for tokens in model.tokenize([example.prompt for example in task.examples]):
        start = len(tokens)
        for _ in range(8):
            ids = torch.tensor([tokens])
            tokens = [*tokens, int(model.next_token_logits(ids, torch.ones_like(ids)).argmax())]
        replies.append(model.tokenizer.convert_ids_to_tokens(tokens[start:]))

    def variety(pair: tuple[str, str]) -> float:
        first = [next((i for i, w in enumerate(r) if w in pair), None) for r in replies]
        at_once, never = first.count(0), first.count(None)
        return min(at_once, never, len(first) - at_once - never)

    said = sorted({word for reply in replies for word in reply} & set(WORDS))
    return max(combinations([*said, "yes", "no"], 2), key=variety)


def talking_task(model, n: int = 24):
    """Random prompts whose options the model does say."""
    return make_task(n, options=spoken_options(model, make_task(n)))


def certified(model, task, steering):
    """A decision for a steering: there is hardly a gain that is not promised."""
    from mera_tl import calibrate

    split = task.subset(range(12), role="calibration")
    return calibrate(model, split, steering, min_gain=-0.99)


def random_probe(model, *, seed: int = 0, scale: float = 1.0):
    """A probe that knows nothing, with scores of unit scale on both sides of zero."""
    from mera_tl.probes import LinearProbe

    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(model.n_layers, model.d_model, generator=generator) * scale
    return LinearProbe(
        weights=weights / model.d_model**0.5,
        bias=torch.zeros(model.n_layers),
        resid_norm=torch.full((model.n_layers,), model.d_model**0.5),
        position="last",
        kind="ridge",
        penalty=3.0,
        best_layer=1,
        clip=0.01,
    )
