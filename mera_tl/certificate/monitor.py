"""Whether a guarantee still holds: watch paired outcomes of audited traffic, one at a time.

Audit a random share of the traffic by also answering it unsteered and grading both. Two kinds of
wealth bet that the mean gain has fallen below a floor. The *e-process* never restarts: its alarm is
false with probability at most `false_alarm`, however long one watches. The *restarted* one forgets
good times, so it is quick after a late change: its alarms are false at most once in `patience`
pairs on average (an e-CUSUM: Shin, Ramdas & Rinaldo 2024). Both hold whatever the past did, as long
as each gain's expectation given the past is at least the floor. Constant work per pair.
"""

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

from mera_tl import storage

N_BETS = 12
BETS: tuple[float, ...] = tuple(0.02 * (0.9 / 0.02) ** (i / (N_BETS - 1)) for i in range(N_BETS))
"""Shares of wealth to stake, from timid (for small harm) to bold; their mean is watched."""


@dataclass(frozen=True, repr=False)
class Monitor:
    """Evidence that the mean gain is below `floor`, after `n` audited pairs.

    A value: `monitor = monitor.update(gain)`; `print(monitor)` says whether the guarantee stands.

    Raises:
        ValueError: if the floor is no gain, `false_alarm` no probability or `patience` not above 1.
    """

    floor: float = 0.0
    """Least mean gain that is still acceptable; 0 asks only whether steering harms."""
    false_alarm: float = 0.05
    """Greatest probability that the e-process ever alarms while the mean gain is acceptable."""
    patience: float = 1000.0
    """Least mean number of audited pairs to a false alarm of the restarted process."""
    n: int = 0
    recoveries: int = 0
    regressions: int = 0
    log_wealth: tuple[float, ...] = (0.0,) * N_BETS
    log_restarted: tuple[float, ...] = (-math.inf,) * N_BETS
    harmful_at: int | None = None
    """Pair at which the e-process first alarmed."""
    changed_at: int | None = None
    """Pair at which the restarted process first alarmed."""

    def __post_init__(self) -> None:
        if not -1 < self.floor < 1:
            raise ValueError(
                f"`floor={self.floor!r}` is not a gain between -1 and 1; pass one, as 0.0."
            )
        if not 0 < self.false_alarm < 1 or not self.patience > 1:
            raise ValueError(
                f"`false_alarm={self.false_alarm!r}` must lie between 0 and 1 and "
                f"`patience={self.patience!r}` above 1; pass, for example, 0.05 and 1000.0."
            )

    def update(self, gain: float) -> "Monitor":
        """Take in one audited pair: steered minus unsteered, in [-1, 1].

        Raises:
            ValueError: if it is not one gain in that range.
        """
        try:
            gain = float(gain)
        except (TypeError, ValueError, RuntimeError):
            said = f"{gain!r:.60} is not one gain; pass several to update_all(gains)."
            raise ValueError(said) from None
        if not -1 <= gain <= 1:  # also refuses NaN
            raise ValueError(
                f"A gain of {gain!r} is not in [-1, 1]; pass steered minus unsteered correctness "
                "or error."
            )
        reach = 1 + abs(self.floor)  # the most a stake can lose, so that wealth stays positive
        growth = [math.log1p(bet / reach * (self.floor - gain)) for bet in BETS]
        wealth = tuple(w + g for w, g in zip(self.log_wealth, growth, strict=True))
        restarted = tuple(max(w, 0.0) + g for w, g in zip(self.log_restarted, growth, strict=True))
        n = self.n + 1
        harmful = _log_mean(wealth) >= math.log(1 / self.false_alarm)
        changed = _log_mean(restarted) >= math.log(self.patience)
        return replace(
            self,
            n=n,
            recoveries=self.recoveries + (gain > 0),
            regressions=self.regressions + (gain < 0),
            log_wealth=wealth,
            log_restarted=restarted,
            harmful_at=self.harmful_at or (n if harmful else None),
            changed_at=self.changed_at or (n if changed else None),
        )

    def update_all(self, gains: Iterable[float]) -> "Monitor":
        """Take in pairs in the order in which they were served."""
        return reduce(Monitor.update, gains, self)

    @property
    def withdraw(self) -> bool:
        """Whether the guarantee should be withdrawn: either alarm, once raised, stands."""
        return self.harmful_at is not None or self.changed_at is not None

    @property
    def e_value(self) -> float:
        """Return the e-process: 1 / e bounds the probability of ever seeing so much by chance."""
        return math.exp(min(700.0, _log_mean(self.log_wealth)))

    @property
    def restarted_e_value(self) -> float:
        """Return the restarted process, to be compared with `patience`."""
        return math.exp(min(700.0, _log_mean(self.log_restarted)))

    def __repr__(self) -> str:
        seen = f"n={self.n}, {self.recoveries} better, {self.regressions} worse"
        return f"Monitor(floor={self.floor:g}, {seen}{', withdraw' if self.withdraw else ''})"

    def __str__(self) -> str:
        s, do = ("", "does") if self.n == 1 else ("s", "do")
        seen = f"{self.n} audited pair{s} ({self.recoveries} better, {self.regressions} worse)"
        what = "harms" if self.floor == 0 else f"gains less than {100 * self.floor:+.1f} points"
        evidence = (
            f"Evidence {self.e_value:.3g} of {1 / self.false_alarm:.4g}, restarted "
            f"{self.restarted_e_value:.3g} of {self.patience:.4g}."
        )
        if not self.withdraw:
            return f"The guarantee stands: {seen} {do} not show that steering {what}.\n{evidence}"
        alarms = [
            f"at pair {at} ({what})"
            for at, what in (
                (self.harmful_at, f"false with probability at most {self.false_alarm:g}"),
                (self.changed_at, f"false once in {self.patience:g} pairs"),
            )
            if at is not None
        ]
        return (
            f"Withdraw the guarantee: {seen} show that steering {what}. Steer nothing until it is "
            f"calibrated again.\nAlarm {' and '.join(alarms)}. {evidence}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain values."""
        # JSON has no infinity; a process that has not begun is null.
        state = asdict(self)
        state["log_restarted"] = [None if v == -math.inf else v for v in self.log_restarted]
        return state

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Monitor":
        """Rebuild a monitor from `to_json`.

        Raises:
            ValueError: if this is not the state of a monitor.
        """
        damaged = ValueError(
            "This is not the state of a monitor, or of another version; start a new one."
        )
        try:
            restarted = tuple(-math.inf if v is None else v for v in state["log_restarted"])
            logs = {"log_wealth": tuple(state["log_wealth"]), "log_restarted": restarted}
            monitor = cls(**state | logs)
            monitor.update(0.0)  # which only numbers allow
        except (KeyError, TypeError):
            raise damaged from None
        lengths = {len(monitor.log_wealth), len(monitor.log_restarted)}
        if set(state) != {field.name for field in fields(cls)} or lengths != {N_BETS}:
            raise damaged
        return monitor

    def save(self, path: str | Path) -> None:
        """Write the state as JSON, whole or not at all."""
        storage.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Monitor":
        """Read a state written by `save`.

        Raises:
            ValueError: naming the file, if there is none or it is not one.
        """
        state = storage.read_json(path)
        try:
            return cls.from_json(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def resume(path: str | Path, **options: float | None) -> Monitor:
    """Go on with the state in a file, or start one with these options (None: the default).

    Raises:
        ValueError: if an option contradicts the state that is there.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not Path(path).exists():
        return Monitor(**given)  # pyright: ignore[reportArgumentType]
    monitor = Monitor.load(path)
    for name, value in given.items():
        if getattr(monitor, name) != value:
            raise ValueError(
                f"{path} was started with {name} {getattr(monitor, name):g}, not {value:g}: what "
                "counts as harm may not change while watching; leave the option out, or start "
                "another file."
            )
    return monitor


def go_on(watch: Monitor, gains: Iterable[float]) -> Monitor:
    """Take in those of all pairs, from the first on, that a monitor has not seen.

    Raises:
        ValueError: if the first pairs are not those that it has seen: of another file, or of one
            that was begun anew, as many would be passed over in silence.
    """
    gains, again = iter(gains), Monitor(watch.floor, watch.false_alarm, watch.patience)
    again = again.update_all(islice(gains, watch.n))
    numbers = [
        (m.n, m.recoveries, m.regressions, *m.log_wealth, *m.log_restarted) for m in (again, watch)
    ]
    if not all(math.isclose(*pair, abs_tol=1e-6) for pair in zip(*numbers, strict=True)):
        raise ValueError(
            f"These pairs do not begin with the {watch.n} that the state has seen; pass the file "
            "that it was started with, grown, or start another state."
        )
    return watch.update_all(gains)


def _log_mean(logs: tuple[float, ...]) -> float:
    top = max(logs)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(value - top) for value in logs) / len(logs))


def read_gains(lines: Iterable[str], log: Iterable[str] | None = None) -> Iterator[float]:
    """Read one gain per line of JSONL, in order: `gain`, or `steered` and `unsteered`.

    The latter two are correctness (true/false, 0/1) or any score in [0, 1] that is better when
    higher. `log` is what `Steering.attach(log=...)` wrote of all traffic: then every line also has
    the hash of its `prompt` (`hash_of_prompt`), and is refused if that was never served. Where the
    log says that nothing was moved the gain is 0, and `unsteered` may be left out. A prompt that
    was served several times meets its lines of the log in order.

    Raises:
        ValueError: naming the line that is neither, or whose prompt is not in the log, or the line
            of the log that is none.
    """
    fired: dict[str, deque[bool]] = defaultdict(deque)
    for number, line in enumerate(log or (), 1):
        try:
            served = json.loads(line) if line.strip() else None
            if served is not None:
                fired[served["prompt"]].append(served["fired"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"Line {number} of the log, {line.strip()[:80]!r}, is none that "
                "steering.attach(model, log=...) wrote; pass that file."
            ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            times = deque([True]) if log is None else fired[record["prompt"]]
            if times and not times[0]:
                gain = 0.0
            elif "gain" in record:
                gain = float(record["gain"])
            else:
                scores = float(record["steered"]), float(record["unsteered"])
                if not all(0 <= score <= 1 for score in scores):  # nor NaN
                    raise ValueError
                gain = scores[0] - scores[1]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"Line {number} is no audited pair: {line.strip()[:80]!r}; write one JSON object a "
                'line, as {"steered": true, "unsteered": false} or {"gain": 1}, and with a log its '
                '"prompt".'
            ) from None
        if not times:
            raise ValueError(
                f"Line {number} is of a prompt that the log does not hold, or not so often; hash "
                "its token ids by mera_tl.steering.hash_of_prompt, and pass the log of attach."
            )
        times.popleft()
        yield gain
