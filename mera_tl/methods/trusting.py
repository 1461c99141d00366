"""Correct nothing, but say which answers to trust: withhold those with a high predicted error.

Where errors cannot be corrected they can be withheld. The probe is the ridge probe at its best
layer, read at the final prompt token; what is promised is P(wrong | answered) <= alpha.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl.certificate.calibration import evidence_of, setup_of
from mera_tl.certificate.description import describe_reader
from mera_tl.certificate.terms import Terms
from mera_tl.certificate.withholding import Withholding, certify_withholding, withholding_thresholds
from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.methods.second_best import reading_hooks
from mera_tl.models.model import Model
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Calibration as CalibrationRole
from mera_tl.tasks.task import Task


def predicted_error(score: Float[Tensor, " example"]) -> Float[np.ndarray, " example"]:
    """Return scores of an error probe as errors between 0 and 1."""
    return torch.sigmoid(score.double()).numpy()


def withheld(outcomes: Outcomes, threshold: float) -> Outcomes:
    """Return the outcomes without an answer where the predicted error exceeds the threshold.

    The predicted error is that of the highest score the hooks have read.
    """
    silent = torch.from_numpy(predicted_error(outcomes.max_score) > threshold)
    probs = outcomes.probs.masked_fill(silent[:, None], 0.0)
    return replace(outcomes, probs=probs, predictions=outcomes.predictions.masked_fill(silent, -1))


def certify_trust(
    model: Model,
    task: Task[CalibrationRole],
    steering: Steering,
    learned: Activations,
    *,
    alpha: float,
    terms: Terms,
    settings: ReadSettings | None = None,
) -> Withholding:
    """Certify up to which predicted error the answers of a calibration split may be given.

    `learned` are activations of the training split, whose predicted errors fix the thresholds. Of
    examples with the same text one is used, by a seeded choice.

    Raises:
        ValueError: if the task is not a calibration split, or as `evaluate`.
    """
    settings = settings or ReadSettings()
    origins = [steering.probe.manifest]
    task = evidence_of(task, terms.seed, origins, model=model, settings=settings)
    probe, (layer,) = steering.probe, steering.layer_numbers
    seen = predicted_error(probe.score(learned.resid("last"))[layer])
    right = learned.correct.numpy()
    asked = {"alpha": alpha, "delta": terms.delta}
    thresholds = withholding_thresholds(seen, len(task), **asked, correct=right)
    read = evaluate(model, task, reading_hooks(steering), settings=settings, title="withhold")
    predicted, correct = predicted_error(read.max_score), read.correct.numpy()
    found = certify_withholding(predicted, correct, **asked, thresholds=thresholds)
    about = {**setup_of(model, task, settings), "reads": describe_reader(steering)}
    return replace(found, setup=about)
