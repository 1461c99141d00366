"""One task where steering is certified, one where nothing is: accuracy over the threshold."""

import pandas as pd

from figures import results, save
from mera_tl.plots import calibration_evidence, steering_curve

SHOWN = {"first": "spam_cue", "abstains": "sentiment_noise"}
METHOD = "controlled_contrastive, grid"


def main() -> None:
    evidence = results("steer_or_abstain", "evidence-*.jsonl")
    for name, task in SHOWN.items():
        rows = pd.DataFrame(evidence[(evidence["task"] == task) & (evidence["method"] == METHOD)])
        save(steering_curve(rows), name)
    certified = (evidence["task"] == SHOWN["first"]) & (evidence["method"] == METHOD)
    save(calibration_evidence(pd.DataFrame(evidence[certified])), "evidence")


if __name__ == "__main__":
    main()
