"""Laws of the monitor: rare false alarms, quick true ones, constant work, a state that resumes."""

import math

import numpy as np
import pytest

from mera_tl.certificate import BETS, Monitor, go_on, read_gains, resume


def stream(rng, shape, recovery, regression):
    u = rng.random(shape)
    return np.where(u < recovery, 1.0, np.where(u > 1 - regression, -1.0, 0.0))


def alarms(gains):
    """Return the pair of each alarm of many streams at once, by the plain formulas (inf: none)."""
    growth = np.log1p(np.array(BETS) * -gains[..., None])
    wealth = np.exp(growth.cumsum(1)).mean(-1)
    restarted, value = [], np.zeros((len(gains), len(BETS)))
    for t in range(gains.shape[1]):
        value = np.maximum(value, 1) * np.exp(growth[:, t])
        restarted.append(value.mean(-1))
    out = []
    for process, limit in ((wealth, 20), (np.array(restarted).T, 1000)):
        raised = process >= limit
        out.append(np.where(raised.any(1), raised.argmax(1) + 1, math.inf))
    return out


def test_the_monitor_is_the_plain_formula():
    gains = stream(np.random.default_rng(0), (4, 900), 0.04, 0.12)
    harmful, changed = alarms(gains)
    assert np.isfinite(harmful).all() and np.isfinite(changed).all()
    for row, first, second in zip(gains, harmful, changed, strict=True):
        monitor = Monitor().update_all(row.tolist())
        assert (monitor.harmful_at, monitor.changed_at) == (first, second)
        assert monitor.withdraw and "Withdraw" in str(monitor)


def test_false_alarms_are_rare_at_the_boundary_and_absent_while_steering_helps():
    rng = np.random.default_rng(1)
    harmful, changed = alarms(stream(rng, (300, 4000), 0.07, 0.07))
    assert np.isfinite(harmful).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    # A mean time to false alarm of 1,000 or more, up to censoring at 4,000.
    assert np.minimum(changed, 4000).mean() >= 1000
    harmful, changed = alarms(stream(rng, (100, 4000), 0.10, 0.04))
    assert not np.isfinite(harmful).any() and not np.isfinite(changed).any()


def test_harm_is_found_soon_and_a_late_change_sooner_by_restarting():
    rng = np.random.default_rng(2)
    harmful, _ = alarms(stream(rng, (100, 1000), 0.04, 0.10))
    assert np.isfinite(harmful).mean() > 0.95 and 200 < np.median(harmful) < 400
    before = stream(rng, (100, 500), 0.10, 0.04)
    after = stream(rng, (100, 2500), 0.04, 0.16)
    harmful, changed = alarms(np.concatenate((before, after), axis=1))
    assert np.isfinite(changed).all() and (changed > 500).all()
    assert np.median(changed) - 500 < 300 < np.median(harmful) - 500


def test_alarms_stand_and_state_resumes(tmp_path):
    gains = stream(np.random.default_rng(3), (600,), 0.02, 0.2).tolist()
    whole = Monitor(floor=-0.01).update_all(gains)
    Monitor(floor=-0.01).save(tmp_path / "m.json")
    assert Monitor.load(tmp_path / "m.json") == Monitor(floor=-0.01)
    Monitor.load(tmp_path / "m.json").update_all(gains[:301]).save(tmp_path / "m.json")
    resumed = Monitor.load(tmp_path / "m.json").update_all(gains[301:])
    assert resumed == whole and whole.withdraw
    assert whole.update_all([1.0] * 500).withdraw


def test_a_state_goes_on_with_the_pairs_that_it_has_seen_and_no_others():
    """As many of another file would be passed over in silence, and the guarantee would stand."""
    gains = stream(np.random.default_rng(3), (600,), 0.02, 0.2).tolist()
    begun, whole = Monitor().update_all(gains[:301]), Monitor().update_all(gains)
    assert go_on(begun, gains) == whole and go_on(begun, gains[:301]) == begun
    for other in (gains[301:], gains[:300], [-1.0] * 600, []):
        with pytest.raises(ValueError, match="begin with the 301 that the state has seen"):
            go_on(begun, other)


def test_a_state_goes_on_under_its_own_terms(tmp_path):
    path = tmp_path / "m.json"
    resume(path, floor=0.02, patience=None).update(1.0).save(path)
    assert resume(path).n == 1 and resume(path, floor=0.02).floor == 0.02
    with pytest.raises(ValueError, match="started with floor 0.02, not 0"):
        resume(path, floor=0.0)


def test_a_floor_moves_what_counts_as_harm():
    gains = stream(np.random.default_rng(4), (3000,), 0.09, 0.05).tolist()  # +4 points
    assert not Monitor().update_all(gains).withdraw
    assert Monitor(floor=0.15).update_all(gains).withdraw


def test_long_streams_neither_overflow_nor_underflow():
    assert Monitor().update_all([-1.0] * 5000).e_value > 1e300
    good = Monitor().update_all([1.0] * 5000)
    assert good.e_value >= 0 and not good.withdraw and "stands" in str(good)


def test_lines_are_read_as_pairs():
    lines = ['{"steered": true, "unsteered": false}', "", '{"gain": -0.25}']
    assert list(read_gains(lines)) == [1.0, -0.25]
    with pytest.raises(ValueError, match="Line 2 is no audited pair"):
        list(read_gains([*lines[:1], '{"steered": 1}']))


def test_audits_are_joined_with_the_log_of_what_was_served():
    log = [f'{{"prompt": "{p}", "fired": {f}}}' for p, f in (("a", "true"), ("b", "false"))]
    log += ["", '{"prompt": "a", "fired": false}']
    audits = [
        '{"prompt": "b", "steered": 1}',  # nothing was moved: no unsteered answer is needed
        '{"prompt": "a", "steered": 0, "unsteered": 1}',
        '{"prompt": "a", "steered": 0, "unsteered": 1}',  # the second time nothing was moved
    ]
    assert list(read_gains(audits, log)) == [0.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="Line 4 is of a prompt that the log does not hold"):
        list(read_gains([*audits, audits[1]], log))
    with pytest.raises(ValueError, match="Line 1 is no audited pair.*prompt"):
        list(read_gains(['{"steered": 1, "unsteered": 0}'], log))
    for pair in ('{"steered": 100, "unsteered": 99.5}', '{"steered": 0, "unsteered": -0.5}'):
        with pytest.raises(ValueError, match="Line 1 is no audited pair"):  # no scores in [0, 1]
            list(read_gains([pair]))
    with pytest.raises(ValueError, match="Line 1 is no audited pair"):  # it was moved
        list(read_gains(['{"prompt": "a", "steered": 1}'], log))


def test_bad_input_is_refused():
    for gain in (1.5, math.nan):
        with pytest.raises(ValueError, match="not in"):
            Monitor().update(gain)
    with pytest.raises(ValueError, match="floor"):
        Monitor(floor=1.0)
    with pytest.raises(ValueError, match="false_alarm"):
        Monitor(false_alarm=0.0)
    for patience in (1.0, math.nan):  # at which no number is an alarm
        with pytest.raises(ValueError, match="patience"):
            Monitor(patience=patience)
    with pytest.raises(ValueError, match="not the state of a monitor"):
        Monitor.from_json({"n": 3})
