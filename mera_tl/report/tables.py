"""Tables of a report: what could be done, what each method did, what else changed, and hashes."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mera_tl.benchmark.records import table
from mera_tl.certificate.certificate import promised_points
from mera_tl.report.run_folder import RunFolder

_CHANGES = {"0->1": "recovered", "1->0": "regressed"}


def ways(run: RunFolder) -> pd.DataFrame:
    """Tabulate what could be done, the recommended first."""

    def points(share: float | None) -> str:
        return "" if share is None else f"{100 * share:+.1f}"

    rows = [
        {
            "do": way.what,
            "by": "" if way.what == "leave alone" else way.method,
            "certified": "" if way.what == "leave alone" else "yes" if way.certified else "no",
            "gain, points": points(way.gain),
            "at least": "" if way.at_least is None else promised_points(way.at_least),
            "better / worse": "" if way.n is None else f"{way.recoveries} / {way.regressions}",
            "passes": str(way.passes),
            "needs": ", ".join(way.needs),
        }
        for way in run.recommendation.ways
    ]
    return pd.DataFrame(rows)


def methods(run: RunFolder) -> pd.DataFrame:
    """Tabulate methods, the decision first: a phone shows the first columns."""
    first = ["method", "decision", "accuracy", "SPI", "recovered", "regressed"]
    named = table(run.records).rename(columns=_CHANGES)
    frame = pd.DataFrame(named[[*first, "steered", "threshold"]])
    # What a method costs, where replies are generated to be scored.
    tokens = [record.get("tokens_generated", 0.0) for record in run.records]
    return frame.assign(**{"tokens per reply": tokens}) if any(tokens) else frame


def compared(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Tabulate the records of several runs; what is the same for all is left out."""
    numbers = table(records).rename(columns=_CHANGES)
    same = [c for c in ("model", "space", "seed", "n") if len(set(numbers[c])) == 1]
    first = ["task", "method", "decision"]
    numbers = numbers.drop(columns=[*same, "error"])
    others = [column for column in numbers if column not in first]
    return pd.DataFrame(numbers[[*first, *others]])


def failures(run: RunFolder) -> pd.DataFrame:
    """Tabulate how well failing replies are read, within kinds of question first."""
    told = [(r["method"], r["details"]) for r in run.records if "probe_auroc" in r["details"]]
    rows = [
        {
            "method": method,
            "AUROC within kinds": _or_none(details["probe_auroc_within_kind"]),
            "over all": _or_none(details["probe_auroc"]),
            "layer": str(details["layers"][0]),
            "prompts": str(details["n_search"]),
        }
        for method, details in told
    ]
    return pd.DataFrame(rows)


def _or_none(auroc: float | None) -> str:
    return "no pair to compare" if auroc is None else f"{auroc:.2f}"


def side_effects(run: RunFolder) -> pd.DataFrame:
    """Tabulate what else changed: probabilities, balance of answers, unanswered prompts."""
    rows = []
    for record in run.records:
        answers, told = run.changes(record["method"]), record.get("free_text")
        said = {} if answers.empty else answers["prediction_after"].value_counts().to_dict()
        text = {"perplexity": "perplexity", "distinct word pairs": "distinct_2"} if told else {}
        rows.append(
            {
                "method": record["method"],
                "regressed": record["transitions"]["1->0"],
                "error change": record["error_change"],
                "weighted F1": record["f1"],
                "unanswered": record["unanswered"],
                **{name: (told or {})[key] for name, key in text.items()},
                **_elsewhere(record),
                **{f'answers "{option}"': int(count) for option, count in sorted(said.items())},
            }
        )
    frame = pd.DataFrame(rows)
    elsewhere = [name for name in frame if name.endswith("better / worse")]
    frame = frame.fillna(dict.fromkeys(elsewhere, "")).fillna(0)
    counts = [name for name in frame if name.startswith("answers ")]
    return frame.astype(dict.fromkeys(counts, int))


def _elsewhere(record: dict[str, Any]) -> dict[str, str]:
    """Say what a steering did to a few prompts of other tasks."""
    return {
        f"{task}, better / worse": f"{told['better']} / {told['worse']} of {told['n']}"
        for task, told in (record.get("elsewhere") or {}).items()
    }


def hashes(run: RunFolder) -> pd.DataFrame:
    """Tabulate what a run was made of."""
    first = run.records[0]
    hashes = {"configuration": first["hashes"]["config"], "model": first["hashes"]["model"]}
    hashes |= {f"{role} data": value for role, value in first["hashes"]["data"].items()}
    return pd.DataFrame((hashes | first["versions"]).items(), columns=["what", "value"])
