"""The laws of searching: cheap equals plain, only training data, the simplest of the best."""

import zlib
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import (
    make_outcomes,
    make_task,
    mixed_options,
    organism,
    random_probe,
    talking_task,
)

from mera_tl import plots, storage
from mera_tl.certificate import Terms, calibrate
from mera_tl.inference import ReadSettings, collect, evaluate
from mera_tl.methods import (
    Candidate,
    Choices,
    ProbeSet,
    Search,
    SearchData,
    Trial,
    TrialStore,
    certify_flip,
    choose,
    divide,
    fit_probe_sets,
    flipped,
    list_candidates,
    log_odds_gradients,
    reading_hooks,
    run_race,
    search,
    search_flip,
    tabulate,
)
from mera_tl.probes import LinearProbe
from mera_tl.sae import load_saes
from mera_tl.steering import Additive, Direction, Gated, ResidualSpace, SAESpace, Steering
from mera_tl.tasks import load_task

WIDE = ReadSettings(batch_size=128)


def split(task, n=16):
    return task.split(0, calibration=n, test=n)


# --- steering per answer ------------------------------------------------------------------------


def test_a_probe_per_answer_reads_only_the_rows_of_its_answer(model):
    task = make_task(16, options=mixed_options(model))
    probe = random_probe(model)
    shut = replace(probe, weights=torch.zeros_like(probe.weights), bias=probe.bias - 50)
    split = LinearProbe.of_answers(probe, (shut, probe))
    steering = Steering(split, positions="last", rule=Gated(-5.0))
    plain = evaluate(model, task, settings=ReadSettings("last"))
    moved = evaluate(model, task, steering.fwd_hooks(), settings=ReadSettings("last"))
    assert 0 < (plain.predictions == 1).sum() < 16
    assert torch.equal(moved.n_steered > 0, plain.predictions == 1)
    change = (
        (moved.probs - plain.probs).abs().amax(-1)
    )  # the second run of a token is not bit-equal
    assert change[plain.predictions == 0].max() < 1e-5 < 1e-3 < change.max()


def test_a_gate_moves_by_the_directions_own_length():
    rule, d = Gated(0.0, 1.5), torch.tensor([3.0, 4.0])
    score = torch.tensor([-1.0, 0.0, 1e-3, 9.0])
    shift = rule.amount(score)[:, None] * rule.step(torch.zeros(2), d, torch.tensor(1.0))
    assert torch.equal(shift.norm(dim=-1), torch.tensor([0.0, 0.0, 7.5, 7.5]))
    assert torch.equal(Gated().amount(score), torch.zeros(4))
    assert Steering(random_probe(_Tiny), rule=rule).at(0.5).rule == rule  # the gate stays a gate


class _Tiny:
    n_layers, d_model = 2, 8


def test_a_gate_that_stays_shut_changes_nothing_though_the_answer_is_asked(model, task):
    probe, other = random_probe(model), random_probe(model, seed=1)
    told, direction = LinearProbe.of_answers(probe, (probe, other)), torch.randn(2, 3, 32)
    inert = Steering(told, direction, Gated(), positions="last").reading_hooks()
    plain, read = evaluate(model, task), evaluate(model, task, inert)
    assert all(hook.per_answer for _, hook in inert)
    assert (read.probs - plain.probs).abs().max() < 1e-5  # a token run twice is not bit-equal
    assert read.max_score.isfinite().all()


# --- candidates ---------------------------------------------------------------------------------


def test_gains_of_the_cheap_way_equal_those_of_whole_runs(models):
    """Rows that answer at once are skipped below the limit; those that answer later never are."""
    model = models["llama"]
    train = split(talking_task(model, 80)).train
    activations = collect(model, train)
    assert activations.outcomes.answered.any()
    probe, other = random_probe(model), random_probe(model, seed=1)
    directions = {
        "one": Direction("one", probe.weights),
        "two": Direction("two", torch.stack([probe.weights, -other.weights])),
    }
    told = LinearProbe.of_answers(probe, (probe, other))
    fitted = {3.0: ProbeSet(probe, directions), None: ProbeSet(told, directions)}
    data = SearchData(model, train, activations, fitted, "error", ReadSettings())
    names = [
        Candidate("one", 3.0, (0, 2), "last", 0.6),
        Candidate("two", None, (1,), "last", 0.7, 0.5),
        Candidate("one", 3.0, (1,), "all", 0.5),
    ]
    places = list(range(0, len(train), 2))
    gains = data.gains(names, places)
    assert gains[:, 1::2].isnan().all()
    for name, row in zip(names, gains, strict=True):
        steered = evaluate(model, train, data.steering(name).fwd_hooks())
        expected = steered.gain(activations.outcomes, "error")
        assert (row[::2] - expected[::2]).abs().max() < 1e-5
        assert (row[::2] != 0).any()
    base = activations.outcomes
    correct = replace(data, metric="correct").gains(names[:1], places)[0, ::2]
    steered = evaluate(model, train, data.steering(names[0]).fwd_hooks())
    assert torch.equal(correct, steered.gain(base)[::2])


def tried(recoveries, regressions, *, n=100, shift=0, **words):
    gains = torch.zeros(n).double()
    gains[shift : shift + recoveries] = 1
    gains[n - regressions :] = -1
    words = {"layers": (0,), "positions": "last", "threshold": 0.1} | words
    return Trial(Candidate("pattern", 3.0, **words), gains)


def test_the_best_is_chosen_and_of_near_ties_the_simplest():
    best = tried(40, 2, layers=(0, 1))
    assert choose([tried(10, 0), best, tried(0, 0)]) == best.candidate
    one_less = tried(39, 2)
    assert choose([best, one_less]) == one_less.candidate  # fewer layers
    milder = tried(40, 2, layers=(0, 1), threshold=0.5)
    assert choose([best, milder]) == milder.candidate
    many_less = tried(30, 2)
    assert choose([best, many_less]) == best.candidate
    # the same net gain at the price of more regressions is worth less
    assert choose([tried(38, 0, threshold=0.01), tried(60, 22)]).threshold == 0.01


def test_a_candidate_that_has_not_seen_everything_cannot_win():
    partial = tried(50, 0)
    partial.gains[50:] = torch.nan
    assert partial.value(1.0) == 1.0
    complete = tried(5, 0)
    assert choose([partial, complete]) == complete.candidate
    table = tabulate([partial, complete])
    assert table["n"].tolist() == [100, 50]
    assert table["recoveries"].tolist() == [5, 50]


def test_where_nothing_helps_the_least_harmful_is_chosen():
    harmless = tried(0, 0, layers=(0, 1, 2))
    assert choose([tried(1, 30), harmless, tried(2, 9)]) == harmless.candidate


def test_the_candidates_cover_every_scope():
    names = list_candidates(Choices(), range(8))
    assert len(names) == len(set(names))
    layers = {name.layers for name in names}
    assert {(layer,) for layer in range(8)} <= layers
    assert tuple(range(8)) in layers
    assert {len(each) for each in layers} == {1, 3, 8}
    assert len({name.layers for name in list_candidates(Choices(), range(40))}) <= 16
    assert all((name.penalty is None) == (name.strength is not None) for name in names)


# --- the search ---------------------------------------------------------------------------------


@cache
def planted(name="spam_cue"):
    splits = load_task(name).split(0, train=360, calibration=150, test=200)
    return splits, collect(organism(), splits.train, settings=WIDE)


SMALL = Choices(
    directions=("contrastive", "controlled_contrastive", "answer_controlled"),
    layers=((1,), (2,)),
    penalties=(0.03,),
    thresholds=(0.1, 0.35),
    gate_thresholds=(0.5,),
    keep=(40, 16, 8, 4),
    keep_per_direction=1,
)


@cache
def found():
    splits, activations = planted()
    return search(organism(), splits.train, activations, choices=SMALL, settings=WIDE)


def test_the_parts_are_disjoint_and_no_text_is_in_both():
    task = split(make_task(100)).train
    twice = replace(
        task, examples=task.examples + tuple(replace(e, row=e.row + 1000) for e in task.examples)
    )
    fit, judge = divide(twice, 1 / 3, seed=0)
    assert sorted(fit + judge) == list(range(len(twice)))
    texts = [{twice.examples[i].key for i in part} for part in (fit, judge)]
    assert not texts[0] & texts[1]
    assert len(judge) == pytest.approx(len(twice) / 3, abs=8)
    assert divide(twice, 1 / 3, seed=0) == (fit, judge)
    assert divide(twice, 1 / 3, seed=1) != (fit, judge)


def test_a_search_sees_nothing_but_training_data():
    splits, activations = planted()
    for other in (splits.calibration, splits.test):
        with pytest.raises(ValueError, match="needs the training split"):
            search(organism(), other, activations)
        with pytest.raises(ValueError, match="needs the training split"):
            search_flip(other, activations)
    with pytest.raises(ValueError, match="are not of the"):
        search(organism(), splits.train.subset(range(50)), activations)


def test_activations_of_another_model_or_way_of_reading_are_refused():
    splits, activations = planted()
    for name, value in (("model_fingerprint", "f00d"), ("readout", "exact"), ("dtype", "bfloat16")):
        other = replace(activations, manifest={**activations.manifest, name: value})
        with pytest.raises(ValueError, match=f"with {name} '{value}', but now organism has"):
            search(organism(), splits.train, other, settings=WIDE)
    activations.check(organism(), WIDE)  # control


def blanked(activations, choices):
    """Activations as they are, blank where examples judge, and blank where some fit."""
    fit, judge = divide(planted()[0].train, choices.search_share, choices.seed)
    for blank in ([], judge, fit[:30]):
        resid = activations.by_position["last"].clone()
        resid[blank] = 0
        yield replace(activations, by_position={"last": resid})


def test_examples_that_judge_fit_nothing():
    splits, activations = planted()
    only = {"directions": ("controlled_contrastive",), "layers": ((1,),), "thresholds": (0.1,)}
    choices = replace(SMALL, **only, gate_thresholds=())
    probes = []
    for seen in blanked(activations, choices):
        result = search(organism(), splits.train, seen, choices=choices, settings=WIDE)
        probes.append(result.steering.probe.weights)
    assert torch.equal(probes[0], probes[1])
    assert not torch.equal(probes[0], probes[2])  # the control


def test_searched_and_certified_once_it_corrects_a_planted_failure_on_test():
    splits, _ = planted()
    result = found()
    base = evaluate(organism(), splits.test, settings=WIDE)
    assert base.accuracy < 0.85
    candidate = result.steering.at(result.chosen.threshold)
    decision = calibrate(organism(), splits.calibration, candidate, settings=WIDE)
    assert len(decision.evidence) == 1
    assert not decision.abstained
    steered = evaluate(organism(), splits.test, decision.fwd_hooks(), settings=WIDE)
    assert steered.accuracy > 0.93
    # the direction that holds no class fixed is in the same table, and far behind
    by_kind = result.table.groupby("direction")["recoveries"].max()
    assert by_kind["answer_controlled"] > 2 * by_kind["contrastive"]


def test_the_table_keeps_what_was_tried_and_the_winner_saw_everything():
    result = found()
    assert len(result.table) >= len(list_candidates(SMALL, range(4)))
    assert result.table["n"].iloc[0] == result.details["n_search"]
    assert set(result.table["positions"]) == {"last", "all"}
    again = search(organism(), planted()[0].train, planted()[1], choices=SMALL, settings=WIDE)
    assert again.chosen == result.chosen
    assert again.table.equals(result.table)


def test_a_saved_search_steers_the_same(tmp_path):
    result, test = found(), planted()[0].test.subset(range(40))
    result.save(tmp_path)
    loaded = Search.load(tmp_path)
    assert loaded.chosen == result.chosen
    runs = [
        evaluate(organism(), test, each.steering.fwd_hooks(), settings=WIDE)
        for each in (result, loaded)
    ]
    assert torch.equal(runs[0].probs, runs[1].probs)
    assert (runs[0].n_steered > 0).any()
    assert len(loaded.table) == len(result.table)
    along_w = replace(result, steering=replace(result.steering, direction=None))
    along_w.save(tmp_path)
    assert (
        Search.load(tmp_path).steering.direction is None and result.steering.direction is not None
    )


def test_the_figure_shows_every_candidate_once():
    table = found().table
    figure = plots.search_table(table)
    marks = [trace for trace in figure.data if trace.name in set(table["direction"])]
    assert sum(len(trace.x) for trace in marks) == len(table)
    (star,) = [trace for trace in figure.data if trace.name == "most valuable"]
    best = table.loc[table[table["n"] == table["n"].max()]["value"].idxmax()]
    assert star.y[0] == pytest.approx(100 * best["recoveries"] / best["n"])


def test_what_was_foreseen_is_drawn_beside_what_came_of_it():
    result = found()
    table = result.table[result.table["foreseen"].notna()]
    assert len(table) < len(result.table)  # those on whole prompts were not foreseen
    figure = result.plot_foresight()
    marks = [trace for trace in figure.data if trace.name in set(table["direction"])]
    assert sum(len(trace.x) for trace in marks) == len(table)
    said = float(figure.layout.title.subtitle.text.rpartition(" ")[2])
    assert said == pytest.approx(result.details["foresight"], abs=0.006)


def test_without_errors_nothing_can_be_found():
    splits, activations = planted()
    base = activations.outcomes
    flawless = replace(activations, outcomes=replace(base, predictions=base.labels))
    result = search(organism(), splits.train, flawless, choices=SMALL, settings=WIDE)
    assert result.table["gain"].max() <= 0


def test_an_ended_search_goes_on_from_what_it_kept(tmp_path, monkeypatch):
    (splits, activations), undisturbed = planted(), found()
    args = (organism(), splits.train, activations)
    short = replace(SMALL, budget=0.0)
    ended = search(*args, choices=short, settings=WIDE, folder=tmp_path)
    assert not ended.details["complete"]
    assert 0 < len(ended.table) <= len(list_candidates(SMALL, range(4)))
    seen = []
    gains = SearchData.gains

    def counted(data, candidates, places):
        seen.extend(places)
        return gains(data, candidates, places)

    monkeypatch.setattr(SearchData, "gains", counted)
    whole = search(*args, choices=SMALL, settings=WIDE, folder=tmp_path)
    n_first = len(seen)
    assert whole.chosen == undisturbed.chosen
    assert whole.table.equals(undisturbed.table)
    again = search(*args, choices=SMALL, settings=WIDE, folder=tmp_path)
    assert len(seen) == n_first  # nothing is tried twice
    assert again.table.equals(whole.table)
    search(*args, choices=replace(SMALL, seed=1), settings=WIDE, folder=tmp_path)
    assert len(seen) > n_first  # another search does not take over what this one kept


def test_a_search_that_is_killed_leaves_no_trials_under_another_ones_name(tmp_path):
    (splits, activations), tried = planted(), Candidate("euclidean", 3.0, (1,), "last", 0.2)
    data = SearchData(organism(), splits.train, activations, {}, "correct", WIDE)

    def opened(seed):
        return TrialStore.open(tmp_path, data, replace(SMALL, seed=seed))

    def tried_with(gain, seed):
        store = opened(seed)
        store.gains = {tried: torch.full((len(splits.train),), gain).double()}
        return store

    tried_with(1.0, seed=0).save(0.0)
    assert opened(0).gains[tried].unique() == 1  # the control
    storage.save_tensors(  # all that the other one has written when it is killed
        tmp_path / "trials.safetensors", {"gains": tried_with(-1.0, seed=1).gains[tried][None]}
    )
    assert not opened(0).gains


def test_a_race_that_goes_on_ranks_by_what_it_had_seen():
    """More examples than a rung had turn the order round; nothing may be tried for that."""

    class Planted(SearchData):
        task, asked = range(64), 0

        def promise(self, candidates, _):
            return dict.fromkeys(candidates, 0.0)

        def gains(self, candidates, places):
            Planted.asked += len(candidates)
            rows = []
            for each in candidates:
                drawn = torch.Generator().manual_seed(zlib.crc32(str(each).encode()))
                rows.append(torch.randint(-1, 2, (64,), generator=drawn).double())
            seen = torch.zeros(64, dtype=torch.bool)
            seen[places] = True
            return torch.stack(rows).where(seen, torch.nan)

    data = Planted.__new__(Planted)  # its gains are planted: no model is asked
    candidates = list_candidates(Choices(), range(4))
    store = TrialStore(None, "", 64)
    trials, _, _ = run_race(data, candidates, Choices(), store)
    asked = Planted.asked
    again, _, _ = run_race(data, candidates, Choices(), store)
    assert Planted.asked == asked > 0
    assert [each.candidate for each in again] == [each.candidate for each in trials]
    sizes = {len(each.seen) for each in trials if each.candidate.positions == "all"}
    assert sizes == {8, 16, 32, 64}  # all directions on an eighth, one on everything


def test_first_order_gains_rank_candidates_as_real_ones_do():
    assert found().details["foresight"] > 0.5


@pytest.mark.parametrize("options", [("yes", "no"), ("blue bird", "blue tree film")])
def test_gradients_are_those_of_whole_options(options, models):
    """A small shift of the final prompt token changes log-odds as the gradient says it will."""
    model, task = models["llama"], make_task(12, options=options)
    resid = collect(model, task).resid()
    gradients = log_odds_gradients(model, task, resid, ReadSettings()).gradients
    probe, layer = random_probe(model), 1
    steering = Steering(probe, layers=(layer,), positions="final", rule=Additive(1e-3))
    hook = steering.hook(layer)
    foreseen = gradients[layer] @ hook.step * 1e-3
    before, after = (
        evaluate(model, task, hooks).probs.double().log() for hooks in ((), steering.fwd_hooks())
    )
    change = (after - before)[torch.arange(12), torch.tensor(task.labels)]
    assert change.abs().max() > 1e-5
    assert torch.corrcoef(torch.stack([foreseen.double(), change]))[0, 1] > 0.98


@pytest.mark.parametrize("readout", ["options", "exact"])
def test_slopes_are_those_of_what_is_read(readout, models):
    """Of a decoded reply, tokens that begin no option count against the true option."""
    model, task = models["llama"], make_task(12)
    settings = ReadSettings(readout)
    resid = collect(model, task, settings=settings).resid()
    before = log_odds_gradients(model, task, resid, settings)
    shifted = resid.clone()
    shifted[0] += 1e-3 * torch.randn(resid[0].shape, generator=torch.Generator().manual_seed(0))
    after = log_odds_gradients(model, task, shifted, settings)
    foreseen = (before.gradients[0] * (shifted - resid)[0]).sum(-1).double()
    assert torch.corrcoef(torch.stack([foreseen, after.log_p - before.log_p]))[0, 1] > 0.98
    flipped = [replace(example, label=1 - example.label) for example in task.examples]
    other = replace(task, examples=tuple(flipped))
    of_both = before.log_p.exp() + log_odds_gradients(model, other, resid, settings).log_p.exp()
    assert torch.allclose(of_both, torch.ones(12).double(), atol=1e-5) == (readout == "options")


# --- flip ---------------------------------------------------------------------------------------


def some_outcomes():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.35, 0.25], [0.0, 0.0, 0.0]])
    labels, predictions = torch.tensor([1, 2, 1, 0]), torch.tensor([0, 2, 0, -1])
    score = torch.tensor([2.0, -1.0, -1.0, 5.0])
    return make_outcomes("abc", labels, predictions, probs, max_score=score)


def test_flipping_exchanges_the_two_best_options_where_error_is_predicted():
    base = some_outcomes()
    after = flipped(base, base.max_score, 0.5)
    assert after.predictions.tolist() == [1, 2, 0, -1]
    assert torch.equal(after.probs[0], torch.tensor([0.3, 0.5, 0.2]))
    assert torch.equal(after.probs[1:], base.probs[1:])
    assert after.transitions(base) == {"0->0": 2, "0->1": 1, "1->0": 0, "1->1": 1}


def test_a_flips_threshold_is_an_error_not_log_odds():
    base = some_outcomes()
    score = torch.full((4,), 0.75)  # an error of .68
    assert torch.equal(flipped(base, score, 0.7).predictions, base.predictions)
    assert not torch.equal(flipped(base, score, 0.65).predictions, base.predictions)


def test_flip_is_searched_certified_and_helps_on_test():
    splits, activations = planted("yesno_hint")
    result = search_flip(splits.train, activations)
    decision = certify_flip(organism(), splits.calibration, result, terms=Terms(), settings=WIDE)
    assert decision.threshold == pytest.approx(result.chosen.threshold)
    base = evaluate(organism(), splits.test, settings=WIDE)
    read = evaluate(organism(), splits.test, reading_hooks(result.steering), settings=WIDE)
    assert (read.probs - base.probs).abs().max() < 1e-5  # reading moves nothing
    assert torch.isfinite(read.max_score).all()
    assert flipped(read, read.max_score, decision.threshold).accuracy > base.accuracy + 0.1


def test_flip_reads_the_final_prompt_token_and_nothing_later(models):
    model = models["llama"]
    train = split(talking_task(model, 60)).train
    activations = collect(model, train)
    probe = random_probe(model)
    hooks = reading_hooks(Steering(probe, layers=(1,)))
    read = evaluate(model, train, hooks)
    expected = probe.score(activations.resid("last"))[1]
    assert (read.max_score - expected).abs().max() < 1e-4


def test_trials_in_other_latents_are_no_trials_of_these(tmp_path):
    model = organism()
    task = load_task("spam_cue").split(0, train=12, calibration=9, test=9).train
    activations = collect(model, task)
    saes = load_saes("organism", (1,), model).saes
    tried = Candidate("euclidean", 3.0, (1,), "last", 0.2)

    def known(space, ways=None):
        data = SearchData(model, task, activations, ways or {}, "correct", ReadSettings(), space)
        store = TrialStore.open(tmp_path, data, Choices())
        found = list(store.gains)
        store.gains = {tried: torch.zeros(len(task)).double()}
        store.save(0.0)
        return found

    assert known(SAESpace(saes)) == []
    assert known(SAESpace(dict(saes))) == [tried]  # the control
    for other in (SAESpace(saes, "gain"), load_saes("organism", (2,), model), ResidualSpace()):
        assert known(other) == []
    ways = fit_probe_sets(activations, SMALL)
    assert known(ResidualSpace(), ways) == [] and known(ResidualSpace(), ways) == [tried]
    flipped = replace(activations.outcomes, labels=1 - activations.labels)
    others = fit_probe_sets(replace(activations, outcomes=flipped), SMALL)
    assert known(ResidualSpace(), others) == []  # of the same names, learned from other answers
