"""A run's folder: how its methods share delta, and what it may be used for again."""

from dataclasses import replace

import pytest
from conftest import SMALL, organism, random_probe, write_task

from mera_tl import storage
from mera_tl.benchmark import Run, RunConfig, open_run
from mera_tl.report import RunFolder
from mera_tl.steering import Steering

CONFIG = RunConfig(model="organism", task="spam_cue")
METHODS = ("optimal_probe", "no_steering", "flip", "searched")


@pytest.mark.parametrize("methods", [METHODS, METHODS[::-1]])
def test_methods_share_delta_whatever_their_order(methods, tmp_path):
    run = Run(CONFIG, tmp_path)
    assert run.terms("flip").delta == 0.05  # alone, before anything is announced
    run.announce(methods)
    shares = {name: run.terms(name).delta for name in ("searched", "flip", "optimal_probe")}
    assert shares == {"searched": 0.025, "flip": 0.0125, "optimal_probe": 0.0125}
    assert run.terms("flip").run_delta == run.familywise_delta == 0.05
    run.announce(methods[:2])  # known already: nothing changes, also for a second process
    assert Run(CONFIG, tmp_path).terms("flip").delta == 0.0125


def test_a_primary_method_gets_all_and_must_be_among_them(tmp_path):
    run = Run(replace(CONFIG, primary="flip"), tmp_path)
    with pytest.raises(ValueError, match="primary='flip' is not among"):
        run.announce(["searched", "no_steering"])
    run.announce(METHODS)
    assert [run.terms(name).delta for name in ("flip", "searched")] == [0.05, 0.0]


def test_methods_that_come_later_pay_for_themselves(tmp_path, caplog):
    run = Run(CONFIG, tmp_path)
    run.announce(["searched"])
    assert not caplog.records and run.terms("searched").delta == 0.05
    run.announce(["flip", "optimal_probe"])
    assert run.terms("flip").delta == 0.025 and run.familywise_delta == 0.1
    assert "together only with delta 0.1" in caplog.text


def test_a_folder_begun_with_other_weights_is_noticed_where_they_are_loaded(tmp_path):
    """A name of the hub may have moved on: then no file here tells."""
    storage.write_json(tmp_path / "content.json", {"model": organism().fingerprint})

    def load(**changes):
        return Run(CONFIG, tmp_path, load=lambda _: replace(organism(), **changes)).model

    assert load().name == load(fingerprint="").name == "organism"  # none: a plan, without weights
    with pytest.raises(ValueError, match="changed: the model's weights"):
        load(fingerprint="f00d")


def test_certificates_that_nobody_announced_are_counted(tmp_path):
    config = replace(CONFIG, train="30", calibration="15", test="15")
    with open_run(config, tmp_path) as run:
        steering = Steering(random_probe(run.model), layers=(1,), positions="last").at(0.3)
        given = [run.calibrate(name, steering) for name in ("mine", "mine", "another", "third")]
        assert [decision.terms.delta for decision in given] == [0.05] * 4
        assert run.familywise_delta == pytest.approx(0.15)
        other = replace(steering, probe=random_probe(run.model, seed=1))
        for asked in (steering.at(0.4), other, [steering, other], replace(steering, layers="all")):
            with pytest.raises(ValueError, match="mine certifies other steerings"):
                run.calibrate("mine", asked)


def test_a_search_budget_ends_with_the_best_so_far_which_is_certified_as_usual(tmp_path):
    sizes = {"train": "120", "calibration": "40", "test": "40"}
    config = replace(CONFIG, positions="last", search_budget="0.001s", **sizes)
    with open_run(config, tmp_path) as run:
        record = run.record("searched")
    details = record["details"]
    assert details["budget"] == 0.001 and not details["complete"]
    assert details["n_candidates"] > 400 and "40" in record["certificate"]
    for wrong in ("10", "0m", "ten minutes", "-5s"):
        with pytest.raises(ValueError, match="no time above 0"):
            replace(CONFIG, search_budget=wrong)


def test_a_second_run_on_the_same_calibration_examples_is_recognised(tmp_path, caplog):
    sizes = {"train": "120", "calibration": "40", "test": "40", "layers": "1"}
    config = replace(CONFIG, positions="last", **sizes)

    def warned(name, method, **changes):
        with open_run(replace(config, **changes), tmp_path / name) as run:
            return run.record(method)["warnings"]

    assert warned("first", "flip") == warned("again", "flip") == []  # the same promise twice
    (_, sentence) = warned("other", "optimal_probe")
    assert "first was certified on 40 of the same" in sentence and "flip" in sentence
    assert sentence in caplog.text
    assert warned("plain", "no_steering") == []  # asks for no certificate
    assert len(warned("stricter", "flip", min_gain=0.1)) == 3
    assert warned("elsewhere", "flip", seed=1) == []  # other examples
    # A second try on more examples, the first ones among them.
    told = warned("larger", "flip", calibration="60")
    assert [each.split(" was certified on ")[1][:14] for each in told] == ["40 of the same"] * 4


def test_what_may_be_cut_of_a_prompt_is_part_of_what_was_answered(checkpoints, tmp_path):
    lines = [f"{'red ' * 40}{i},{'blue ' * 40}{i},{'yes' if i % 2 else 'no'}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["one,two,label", *lines]), "utf-8")

    def form(text):
        keys = f'options = ["yes", "no"]\ndata = "t.csv"\ntext = "{text}"\n'
        path = tmp_path / "t.toml"
        path.write_text(f'{keys}template = "question : {{one}} ? {{two}} answer :"\n', "utf-8")
        return str(path)

    config = RunConfig(model=str(checkpoints["llama"]), task=form("one"), truncate=True, **SMALL)
    with open_run(config, tmp_path / "run") as run:
        first = run.splits.train.data_hash, run._key(run.splits.train)
    form("two")  # the same prompts, cut elsewhere
    other = Run(config, tmp_path / "other", load=lambda _: run.model)
    assert other.splits.train.data_hash == first[0]
    assert other._key(other.splits.train) != first[1]
    with pytest.raises(ValueError, match="changed: texts"), open_run(config, tmp_path / "run"):
        pass
    form("one")
    with open_run(config, tmp_path / "run") as run:  # the control
        assert run._key(run.splits.train) == first[1]


def test_a_folder_knows_its_data_and_its_weights(checkpoints, tmp_path):
    import shutil

    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    config = RunConfig(model=str(model), task=write_task(tmp_path), **SMALL)
    out = tmp_path / "run"
    with open_run(config, out) as run:
        first = run.record("no_steering")
    for path in model.iterdir():
        path.touch()  # a copy of the same weights
    with open_run(config, out) as run:
        assert run.record("no_steering") == first
    data, told = tmp_path / "toy.csv", model / "tokenizer.json"
    weights = model / "model.safetensors"
    one_bit = bytearray(weights.read_bytes())
    one_bit[-2] ^= 1  # of one neuron
    for path, other, what in (
        (told, told.read_bytes().replace(b'"red"', b'"kite"'), "its tokenizer"),
        (data, data.read_bytes().replace(b"red", b"blue"), "data"),
        (weights, bytes(one_bit), "the model's weights"),
    ):
        before = path.read_bytes()
        path.write_bytes(other)
        refused = pytest.raises(ValueError, match=rf"changed: {what}\)")
        with refused, open_run(config, out):
            pass
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["records.jsonl", "config.json", "content.json"])
def test_a_damaged_file_of_a_folder_is_named(name, checkpoints, tmp_path):
    config = RunConfig(model="organism", task="spam_cue", train="30", calibration="9", test="9")
    out = tmp_path / "run"
    with open_run(config, out) as run:
        run.record("no_steering")
    path = out / name
    path.write_text(path.read_text("utf-8")[:20], "utf-8")
    with pytest.raises(ValueError, match=name), open_run(config, out) as run:
        run.record("no_steering")


@pytest.mark.parametrize(("limit", "decision"), [(0.2, "STEER"), (0.001, "ABSTAIN")])
def test_a_limit_on_regressions_is_certified_together_with_the_gain(limit, decision, tmp_path):
    sizes = {"train": "300", "calibration": "150", "test": "60", "layers": "1"}
    config = replace(CONFIG, positions="last", max_regressions=limit, **sizes)
    with open_run(config, tmp_path) as run:
        record = run.record("flip")
    assert record["decision"] == decision
    found = RunFolder.open(tmp_path)
    (row,) = found.certificates["flip"].evidence
    assert row.lower > 0  # the gain alone would do
    if decision == "STEER":
        promise = "at least +0.0 points and at most 20.0 % of answers turned wrong"
        assert promise in record["certificate"]
        assert found.verdict.sentence == "FLIP (certified >= +0.0 points, <= 20 % turned wrong)"
    else:
        assert "allowed 0.1 %" in record["certificate"] and row.regressed_at_most > limit


def test_prefix_and_system_prompt_reach_the_model(tmp_path):
    with pytest.raises(ValueError, match="system prompt needs a chat template"):
        _ = Run(replace(CONFIG, system="Be brief."), tmp_path).model
    assert Run(replace(CONFIG, answer_prefix="It is"), tmp_path).read.answer_prefix == "It is"
