"""One task where steering is certified, one where nothing is: accuracy over the threshold."""

import pandas as pd

from figures import results, save
from mera_tl.plots import steering_curve

SHOWN = {
    "first": ("spam_cue", "A planted failure is corrected: {before:.0f} % to {after:.0f} % right"),
    "abstains": ("sentiment_noise", "Errors of chance cannot be corrected: the tool abstains"),
}
METHOD = "controlled_contrastive, grid"
SETTINGS = (
    "{task}, organism: {n} calibration examples, {certified} of 10 thresholds certified at 95 %"
)
"""Of the line below a title."""


def main() -> None:
    evidence = results("steer_or_abstain", "evidence-*.jsonl")
    for name, (task, finding) in SHOWN.items():
        rows = pd.DataFrame(evidence[(evidence["task"] == task) & (evidence["method"] == METHOD)])
        before, best = float(rows["base"].iloc[0]), float(rows["gain"].max())
        words = {"task": task, "n": rows["n"].iloc[0], "before": 100 * before}
        words["after"] = 100 * (before + best)
        words["certified"] = int((rows["lower"] >= rows["min_gain"]).sum())
        title, line = finding.format(**words), SETTINGS.format(**words)
        save(steering_curve(rows), name, finding=title, settings=line)


if __name__ == "__main__":
    main()
