"""What was tried: a candidate with its gains, the choice among many, and what a search keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl import storage
from mera_tl.certificate.description import describe_space, tensor_hash
from mera_tl.methods.candidates import Candidate, SearchData, candidate_from
from mera_tl.models.identity import manifest_of


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate with its paired gains; NaN for the examples that it has not seen."""

    candidate: Candidate
    gains: Float[Tensor, " example"]

    @property
    def seen(self) -> Float[Tensor, " seen"]:
        """The gains on the examples that it has seen."""
        return self.gains[~self.gains.isnan()]

    def value(self, caution: float) -> float:
        """Return the mean gain less `caution` standard errors: what it may be worth elsewhere."""
        seen = self.seen
        return float(seen.mean() - caution * seen.std(correction=0) / len(seen) ** 0.5)


def choose(tried: Sequence[Trial], caution: float = 1.0) -> Candidate:
    """Return the candidate of greatest value or, of those that are hardly worse, the simplest.

    Hardly worse: no more regressions, and behind by at most one standard error of a sum of paired
    differences that is zero on average.
    Simplest: fewest layers, then the last token rather than all, then the mildest threshold.
    """
    complete = max(len(each.seen) for each in tried)
    finalists = [each for each in tried if len(each.seen) == complete]
    best = max(finalists, key=lambda each: each.value(caution))

    def close(other: Trial) -> bool:
        behind = best.seen - other.seen
        harm = [int((each.seen < 0).sum()) for each in (best, other)]
        return harm[1] <= harm[0] and float(behind.sum()) <= float(behind.norm()) + 1e-9

    def simplicity(other: Trial) -> tuple[Any, ...]:
        way = other.candidate
        rank = (len(way.layers), way.positions == "all", way.strength or 0.0, -way.threshold)
        return *rank, -other.value(caution)

    # Only candidates that are of use at all may be called simple.
    useful = [each for each in finalists if close(each) and each.value(caution) > 0]
    return min(useful or [best], key=simplicity).candidate


def tabulate(
    tried: Sequence[Trial], caution: float = 1.0, foreseen: Mapping[Candidate, float] | None = None
) -> pd.DataFrame:
    """Return one row per candidate, the most valuable first; with its first-order gain if known."""
    rows = [
        asdict(each.candidate)
        | {
            "n": len(each.seen),
            "recoveries": int((each.seen > 0).sum()),
            "regressions": int((each.seen < 0).sum()),
            "gain": float(each.seen.mean()),
            "value": each.value(caution),
        }
        | ({} if foreseen is None else {"foreseen": foreseen.get(each.candidate)})
        for each in tried
    ]
    return pd.DataFrame(rows).sort_values(["n", "value"], ascending=False, ignore_index=True)


class TrialStore:
    """The gains that have been seen, by candidate; in a folder, if there is one."""

    def __init__(self, path: Path | None, key: str, n: int) -> None:
        self._path, self._key = path, key
        self._nothing = torch.full((n,), torch.nan, dtype=torch.double)
        self.gains: dict[Candidate, Float[Tensor, " example"]] = {}
        self.seconds = 0.0
        """Spent by earlier attempts."""

    @classmethod
    def open(cls, folder: str | Path | None, data: SearchData, choices: Any) -> "TrialStore":
        """Open what was kept of the same search, or begin anew."""
        about = {"choices": asdict(replace(choices, budget=None)), **manifest_of(data.model)}
        about |= {"data": data.task.data_hash, "space": describe_space(data.space)}
        # Of the examples that fitted nothing else is known here than what came of them.
        about["ways"] = {
            str(penalty): tensor_hash(
                ways.probe.weights, ways.probe.bias, *(d.vectors for d in ways.directions.values())
            )
            for penalty, ways in data.probe_sets.items()
        }
        read = asdict(data.settings)
        about |= {"read": {name: read[name] for name in read if not name.startswith("batch_")}}
        path = None if folder is None else Path(folder)
        store = cls(path, storage.fingerprint(about), len(data.task))
        if path is not None and (path / "trials.json").exists():
            plain = storage.read_json(path / "trials.json")
            if plain["key"] == store._key:
                known = [candidate_from(each) for each in plain["candidates"]]
                # Tensors are written first: after a sudden end there may be more of them.
                gains = storage.load_tensors(path / "trials.safetensors")["gains"][: len(known)]
                store.gains = dict(zip(known, gains, strict=True))
                store.seconds = plain["seconds"]
            else:  # what another search tried: its tensors are about to be replaced
                storage.reopen(path / "trials.json")
        return store

    def save(self, seconds: float) -> None:
        """Write everything that has been seen."""
        if self._path is not None and self.gains:
            tensors = {"gains": torch.stack(list(self.gains.values()))}
            storage.save_tensors(self._path / "trials.safetensors", tensors)
            candidates = [asdict(each) for each in self.gains]
            plain = {"key": self._key, "seconds": seconds, "candidates": candidates}
            storage.write_json(self._path / "trials.json", plain)

    def trial(self, candidate: Candidate, places: Sequence[int] | None = None) -> Trial:
        """Return a candidate with its gains, at some places or at all."""
        gains = self.gains.get(candidate, self._nothing)
        if places is None:
            return Trial(candidate, gains)
        some = self._nothing.clone()
        some[places] = gains[places]
        return Trial(candidate, some)

    def n_known(self, candidates: Sequence[Candidate], places: Sequence[int]) -> int:
        """Return how many of the first places all candidates have seen."""
        seen = [~self.trial(candidate).gains[places].isnan() for candidate in candidates]
        return int(torch.stack(seen).all(0).int().cummin(0).values.sum())

    def lacks(self, candidate: Candidate, places: Sequence[int]) -> bool:
        """Return whether a candidate has not seen all of these places."""
        return bool(self.trial(candidate).gains[places].isnan().any())

    def add(
        self, candidates: Sequence[Candidate], gains: Float[Tensor, "candidate example"]
    ) -> None:
        """Add gains; NaN is nothing new."""
        for candidate, new in zip(candidates, gains, strict=True):
            old = self.trial(candidate).gains
            self.gains[candidate] = old.where(new.isnan(), new)
