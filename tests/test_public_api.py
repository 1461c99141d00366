"""What users import, what they see, and what they are told when they slip."""

import ast
import json
import re
from pathlib import Path

import pytest
from conftest import python

ROOT = Path(__file__).parents[1]
ROOMS = {path.name for path in (ROOT / "mera_tl").iterdir() if path.is_dir()} | {"storage"}
DEEP = {
    "test_layering.py",  # is about modules
}
"""Files that may import from modules: each says why."""

MISTAKES = """
import tempfile
import warnings
import numpy as np
import mera_tl
from mera_tl.inference import ReadSettings
from mera_tl.live import open_bench

warnings.simplefilter("ignore")
one = np.int64(1)  # numbers of NumPy's are numbers
model = mera_tl.load_model("organism", n_devices=one)
splits = mera_tl.load_task("yesno_bias").split(one, train=60 * one, calibration=20, test=20)
mera_tl.Terms(seed=one)
mera_tl.generate(model, ["a prompt"], max_new_tokens=one)
activations = mera_tl.collect(model, splits.train)
probe = mera_tl.fit_error_probe(activations)
steering = mera_tl.Steering(probe, layers=(1,), positions="last").at(0.3)
decision = mera_tl.calibrate(model, splits.calibration, steering)
direction = mera_tl.fit_direction(activations, probe, "pattern")
(reply,) = mera_tl.generate(model, ["a prompt"], steering)
slips = [
    lambda: mera_tl.evaluate(model, splits.test, steering),
    lambda: mera_tl.evaluate(model, splits.test, steering.fwd_hooks),
    lambda: mera_tl.evaluate(model, splits.test, None),
    lambda: mera_tl.evaluate(model, splits),
    lambda: mera_tl.evaluate("organism", splits.test),
    lambda: mera_tl.collect(model, ["hello"]),
    lambda: mera_tl.collect(None, splits.train),
    lambda: mera_tl.load_model(None),
    lambda: mera_tl.fit_error_probe(splits.train),
    lambda: mera_tl.calibrate(model, splits.test, steering),
    lambda: mera_tl.evaluate_many(model, "spam_cue", [steering]),
    lambda: mera_tl.Steering(activations),
    lambda: mera_tl.explain(model, splits.test, steering),
    lambda: mera_tl.explain(model, splits.test.examples[0], decision),
    lambda: mera_tl.evaluate(model, splits.test, [steering]),
    lambda: mera_tl.evaluate(model, splits.test, settings="options"),
    lambda: mera_tl.evaluate_many(model, splits.test, steering),
    lambda: mera_tl.search(model, splits),
    lambda: mera_tl.search(model, splits.train, probe),
    lambda: mera_tl.calibrate(model, splits, steering),
    lambda: mera_tl.calibrate(model, splits.calibration, probe),
    lambda: mera_tl.calibrate(model, splits.calibration, steering, terms=0.05),
    lambda: mera_tl.certify(np.array([["a"]])),
    lambda: mera_tl.generate(model, "a prompt"),
    lambda: mera_tl.generate(model, [3]),
    lambda: mera_tl.generate(model, ["a prompt"], decision),
    lambda: mera_tl.generate("organism", ["a prompt"]),
    lambda: mera_tl.fit_error_probe(activations, kind="svm"),
    lambda: mera_tl.fit_error_probe(activations, penalty=-1),
    lambda: mera_tl.fit_error_probe(activations, clip=0.7),
    lambda: mera_tl.fit_direction(splits.train, probe, "pattern"),
    lambda: mera_tl.Steering(probe, direction),
    lambda: mera_tl.Steering(probe, rule=0.3),
    lambda: mera_tl.Steering(probe, space="sae"),
    lambda: mera_tl.Steering(probe, layers=("1",)),
    lambda: mera_tl.Additive(float("nan")),
    lambda: mera_tl.Adaptive("0.3"),
    lambda: mera_tl.load_task(None),
    lambda: mera_tl.load_model(""),
    lambda: mera_tl.load_model("organism", engine="vllm"),
    lambda: mera_tl.load_model("organism", device="tpu"),
    lambda: open_bench(3),
    lambda: steering.attach("organism"),
    lambda: mera_tl.open_run("organism", "runs/x").__enter__(),
    lambda: mera_tl.method("name"),
    lambda: probe.plot("accuracy"),
    lambda: activations.outcomes.compare(None),
    lambda: activations.outcomes.gain(activations.outcomes, "accuracy"),
    lambda: ReadSettings(batch_size=0),
    lambda: mera_tl.SAESpace(3),
    lambda: mera_tl.load_saes("organism", 1, model),
    lambda: mera_tl.load_task("spam_cue").split(train=0.6),
    lambda: mera_tl.load_task("spam_qu"),
    lambda: model.tokenize("one text"),
    lambda: steering.at("0.3"),
    lambda: mera_tl.calibrate(model, splits.calibration, steering, min_gain="2 %"),
    lambda: mera_tl.calibrate(model, splits.calibration, steering, delta="5 %"),
    lambda: mera_tl.load_task(["spam_cue"]),
    lambda: splits.train.subset(3),
    lambda: mera_tl.Task("mine", (("prompt", "yes"),), "all"),
    lambda: probe.score(activations),
    lambda: probe.plot(beside=probe),
    lambda: activations.plot(layer=9),
    lambda: mera_tl.fit_error_probe(activations, kind=["ridge"]),
    lambda: mera_tl.certify([1, 0, 1]),
    lambda: mera_tl.load_steering(decision),
    lambda: mera_tl.search(model, splits.train, activations, choices={"layers": (1,)}),
    lambda: mera_tl.methods.Choices(layers=(1,)),
    lambda: mera_tl.methods.Choices(directions="pattern"),
    lambda: mera_tl.methods.find_methods("flip"),
    lambda: mera_tl.Monitor().update([1, 0]),
    lambda: mera_tl.RunConfig(model="organism", task="spam_cue", train=900),
    lambda: mera_tl.generate(model, ["a prompt"], max_new_tokens="3"),
    lambda: mera_tl.load_model("organism", device=0),
    lambda: mera_tl.load_task("spam_cue").split(seed="a"),
    lambda: mera_tl.Example(0, "yes or no?", options="yes", label=0),
    lambda: mera_tl.Example(0, "yes or no?", options=("yes", "no"), label="no"),
    lambda: decision.save(None),
    lambda: probe.save(3),
    lambda: activations.save(None),
    lambda: mera_tl.Monitor().save(None),
    lambda: mera_tl.collect(model, splits.train, out=3),
    lambda: mera_tl.load_saes("organism", (1,), "organism"),
    lambda: mera_tl.load_model("organism", n_devices="2"),
    lambda: mera_tl.Steering(probe, first_k="3"),
    lambda: splits.train["first"],
]
for slip in slips:
    try:
        slip()
        print("nothing was said")
    except ValueError as error:
        print(str(error).splitlines()[0])
    except Exception as error:
        print("not ours:", type(error).__name__, str(error)[:90])
for name in ("run_with_cache", "to_tokens", "generate", "colour"):
    try:
        getattr(model, name)
    except AttributeError as error:
        print(error)
print("---")
assert mera_tl.Monitor().update_all(activations.outcomes.gain(activations.outcomes)).n
for value in (splits.train, splits, model, steering, decision, probe, activations,
              activations.outcomes):
    assert "<" in value._repr_html_()
    print(repr(value))
ledger = mera_tl.explain(model, splits.test.examples[0], steering)
with steering.attach(model) as attachment, mera_tl.open_run(
    mera_tl.RunConfig(model="organism", task="yesno_bias"), tempfile.mkdtemp()
) as run:
    monitor = mera_tl.Monitor()
    for value in (direction, reply, reply.trace, ledger, attachment, run, run.config, monitor):
        print(repr(value))
"""
WORDS = (
    "no list of hooks; pass its hooks, as steering.fwd_hooks()",
    "was not called",
    "None is no list of hooks",
    "one of its splits, as splits.train",
    "is no model; pass what mera_tl.load_model",
    "is no task",
    "None is no model",
    "None is no name of a model",
    "collect(model",
    "needs the calibration split",
    "is no task",
    "is no probe",
    "is not one example",
    "is no list of hooks; pass its hooks, as steering.fwd_hooks()",
    "is no hook; pass pairs",
    "pass them as ReadSettings(",
    "pass them as [steering, ...]",
    "one of its splits, as splits.train",
    "holds no activations; pass collect(",
    "one of its splits, as splits.train",
    "is neither a Steering nor a sequence of them",
    "pass them as Terms(delta=0.05)",
    "are no numbers",
    "is no list of texts; pass one, as [prompt]",
    "The prompt 3 is no text",
    "is no steering; pass one, as decision.steering",
    "is no model; pass what mera_tl.load_model",
    "There is no probe 'svm'; pass one of ridge",
    "penalty=-1 is not a finite number",
    "clip=0.7 is not between 0 and 0.5",
    "pass collect(model, task) and fit_error_probe",
    "as fit_direction(activations, probe, kind).vectors",
    "rule=0.3 is no rule; pass one, as Adaptive()",
    "space='sae' is no space",
    "numbered 0 to 3",
    "strength=nan is no number",
    "limit='0.3' is no number",
    "None is no name of a task",
    "is no name of a model",
    "engine='vllm' is none of auto, transformer_lens, hugging_face",
    "There is no device 'tpu'",
    "3 is no model",
    "'organism' is no model; pass what mera_tl.load_model",
    "pass RunConfig(model=..., task=...)",
    "put @mera_tl.method above a function",
    "There is no metric 'accuracy'; pass one of",
    "None are no outcomes",
    "There is no metric 'accuracy'; pass 'correct' or 'error'",
    "batch_size=0 is no count",
    "at least one SAE",
    'layers=1 is not "all" or a tuple',
    "train=0.6` is no number of examples",
    "did you mean spam_cue or spam_hint or spam_clean?",
    "is no list of texts; pass one, as [prompt]",
    "threshold='0.3' is not a predicted error",
    "min_gain='2 %'` is not a gain",
    "delta='5 %'` is not a probability",
    "is no name of a task",
    "pass several, as range(100)",
    "is no example",
    "is no tensor; pass activations.resid()",
    "pass {name: probe}",
    "layer=9 is none of 0 to 3",
    "There is no probe ['ridge']",
    "as [gains] for one candidate",
    "is no folder; pass the one that decision.save(...) wrote",
    "pass mera_tl.methods.Choices(...)",
    "layers=(1,) are no sets; pass sets",
    "pass them as ('pattern',)",
    "methods='flip' is no list of names; pass one, as ['flip']",
    "is not one gain; pass several to update_all",
    "train=900 is of type int; give str, as '900'",
    "max_new_tokens='3'",
    "There is no device '0'; pass cpu",
    "seed='a'` is no whole number",
    "is one text; pass several, as ('yes', 'no')",
    "label='no' is no place of an option",
    "None is no path",
    "3 is no path",
    "None is no path",
    "None is no path",
    "3 is no path",
    "is no model; pass what mera_tl.load_model",
    "n_devices='2' is no number of devices",
    "first_k='3' is no number of generated tokens",
    "'first' is no place of an example",
)
NO_ATTRIBUTES = (
    "no 'run_with_cache'; model.hooked has, and takes token ids: model.hooked.run_with_cache.",
    "no 'to_tokens'; model.tokenize([prompt])",
    "no 'generate'; mera_tl.generate(model, [prompt])",
    "A Model has no 'colour'.",
)


@pytest.fixture(scope="module")
def told():
    # In a process of its own: there no type checker stands in front of the messages.
    said, shown = python(MISTAKES).stdout.split("---\n")
    return said.splitlines(), shown.splitlines()


def test_a_slip_gets_a_sentence(told):
    for said, words in zip(told[0], WORDS + NO_ATTRIBUTES, strict=True):
        assert words in said and "?." not in said, said


def test_values_say_what_they_are_in_one_line(told):
    for shown in told[1]:
        assert len(shown) <= 300 and " object at " not in shown, shown
    assert told[1][0] == "Task(yesno_bias, train, 60 examples, options yes/no)"


def test_a_share_is_written_one_way():
    # As "47 %": Python's and plotly's own format would put "47%" beside it.
    own = re.compile(r"[:.]\d*%[}\"]")
    assert own.search('f"{share:.0%}"') and own.search('tickformat=".0%"')
    for path in (ROOT / "mera_tl").rglob("*.py"):
        assert not own.search(path.read_text(encoding="utf-8")), path


def test_importing_is_light():
    code = "import time; t = time.perf_counter(); import mera_tl; print(time.perf_counter() - t)"
    # 0.01 s here; a loose bound, since machines are busy.
    assert float(python(code).stdout) < 1


def imported_from(path: Path) -> set[str]:
    """Modules of mera_tl that a file names in `from ... import`."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    else:
        source = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if (node.module or "").startswith("mera_tl.")}


FILES = [
    path
    for folder in ("tests", "experiments", "figures")
    for path in sorted((ROOT / folder).glob("*"))
    if path.suffix in (".py", ".ipynb") and path.name not in DEEP
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_users_import_from_the_package_or_a_room(path):
    for module in imported_from(path):
        assert module.count(".") == 1 and module.split(".")[1] in ROOMS, module


def test_the_finder_sees_deep_imports(tmp_path):
    path = tmp_path / "deep.py"
    path.write_text("from mera_tl.inference.answers import read_batch\nimport mera_tl\n")
    assert imported_from(path) == {"mera_tl.inference.answers"}
