"""Correct without steering: answer the second-best option where the predicted error is too high.

The baseline that every way of steering must beat. Where a probe reads the error well and options
are few it is strong, and it costs nothing. It has the probes of the search, per answer too, and the
same choice on training data and certificate.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl.certificate.calibration import certify_outcomes, evidence_of, setup_of
from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.description import describe_reader
from mera_tl.certificate.terms import Terms
from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.methods.candidates import Candidate, steering_of
from mera_tl.methods.race import Choices, Search, divide, fit_probe_sets, require_training
from mera_tl.methods.trials import Trial, choose, tabulate
from mera_tl.models.model import FwdHooks, Model
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Calibration as CalibrationRole
from mera_tl.tasks.task import Task, Train


def flipped(outcomes: Outcomes, score: Float[Tensor, " example"], threshold: float) -> Outcomes:
    """Return the outcomes with the second-best option where the predicted error is too high.

    The two options exchange their probabilities. An unanswered example stays so.
    """
    too_high = (score > torch.logit(torch.tensor(threshold))) & outcomes.answered
    best, second = outcomes.probs.topk(2, dim=-1).indices.unbind(-1)
    chosen = too_high.nonzero()[:, 0]
    probs, predictions = outcomes.probs.clone(), outcomes.predictions.clone()
    probs[chosen, best[chosen]] = outcomes.probs[chosen, second[chosen]]
    probs[chosen, second[chosen]] = outcomes.probs[chosen, best[chosen]]
    predictions[chosen] = second[chosen]
    return replace(outcomes, probs=probs, predictions=predictions)


def search_flip(
    task: Task[Train], activations: Activations, *, choices: Choices | None = None
) -> Search:
    """Choose probe, layer and threshold on training data; needs no model.

    Raises:
        ValueError: as `search`.
    """
    choices = choices or Choices()
    require_training(task, activations)
    fit, judge = divide(task, choices.search_share, choices.seed)
    learned, held_out = (activations.subset(torch.tensor(part)) for part in (fit, judge))
    probe_sets = fit_probe_sets(learned, replace(choices, directions=()))
    base, resid = held_out.outcomes, held_out.resid("last")
    trials = []
    for penalty, probes in probe_sets.items():
        scores = probes.probe.score(resid, base.predictions)
        for layer, score in enumerate(scores):
            for threshold in choices.gate_thresholds if penalty is None else choices.thresholds:
                candidate = Candidate("flip", penalty, (layer,), "final", threshold)
                gains = flipped(base, score, threshold).gain(base, choices.metric)
                trials.append(Trial(candidate, gains))
    chosen = choose(trials, choices.caution)
    probes = probe_sets[chosen.penalty]
    steering = steering_of(chosen, probes.probe, None)
    details = {"n_fit": len(fit), "n_search": len(judge), "notes": ()}
    return Search(chosen, steering, tabulate(trials, choices.caution), details)


def reading_hooks(steering: Steering) -> FwdHooks:
    """Return hooks that move nothing and read the score at the final prompt token."""
    return replace(steering, positions="final").reading_hooks()


def certify_flip(
    model: Model,
    task: Task[CalibrationRole],
    found: Search,
    *,
    terms: Terms,
    min_gain: float = 0.0,
    settings: ReadSettings | None = None,
) -> Calibration:
    """Certify the one flip that was chosen, on held-out examples, or abstain."""
    settings = settings or ReadSettings()
    origins = [found.steering.probe.manifest]
    task = evidence_of(task, terms.seed, origins, model=model, settings=settings)
    base = evaluate(model, task, reading_hooks(found.steering), settings=settings, title="flip")
    threshold = found.chosen.threshold
    return certify_outcomes(
        task,
        base,
        [flipped(base, base.max_score, threshold)],
        candidates=[{"threshold": threshold, "reads": describe_reader(found.steering)}],
        terms=terms,
        min_gain=min_gain,
        setup=setup_of(model, task, settings),
    )
