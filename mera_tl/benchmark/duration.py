"""How long each method of a run will take, from the rate that its pre-flight measured.

Counted in prompts that are run once. A threshold or a candidate that moves whole prompts costs one
for each of them; one that moves the last token shares its prompt's run, and costs little. The first
method that needs that run pays for all.
"""

from collections.abc import Sequence

from mera_tl.benchmark.config import RunConfig, parse_tasks, parse_thresholds
from mera_tl.benchmark.elsewhere import N_PROMPTS
from mera_tl.inference.progress import seconds_of
from mera_tl.methods.families import FAMILIES, MOST_TAUGHT
from mera_tl.methods.race import Choices, planned_trials
from mera_tl.methods.replying import ReplyChoices, planned_replies
from mera_tl.methods.treatment import Method
from mera_tl.models.model import Model
from mera_tl.tasks.task import Splits

TRIAL_TOKENS = 2
"""As many tokens of a prompt a candidate costs on one example where it moves the last one only."""
EVERYWHERE = 4
"""Prompts that a search runs for each of its judging examples, besides such trials: unsteered, for
gradients, and where the best of each direction moves whole prompts."""
FAMILY_TRIALS = 30
"""Candidates that a family tries on each judging example, on average."""
FAMILY_PASSES = 1.25
"""Unsteered passes of each judging example, which families share."""
FIT_SECONDS = 1.4e-6
"""Of the paper's grid of probes, per layer and squared width, on one core."""
READERS = ("flip", "class_probe", "withhold")
"""Methods that read an unsteered pass of their own."""


def method_seconds(
    methods: Sequence[Method],
    splits: Splits,
    model: Model,
    config: RunConfig,
    *,
    rate: float,
    n_tokens: float,
) -> dict[str, float]:
    """Estimate the seconds of every method, and those of what all share as `unsteered`.

    `rate` is seconds a prompt, of `n_tokens` on average. What is in the folder already is not
    deducted; a method that abstains saves the test.
    """
    n_train, n_calibration, n_test = (len(split) for split in splits)
    share = TRIAL_TOKENS / n_tokens
    whole = config.positions == "all"
    thresholds = len(parse_thresholds(config.thresholds)) * (1.0 if whole else share)
    n_other = N_PROMPTS * len(parse_tasks(config.other_tasks))
    seconds = {"unsteered": rate * (n_train + n_test + n_other)}
    families = [each.name for each in methods if each.name in FAMILIES]
    is_shared = False  # once a method has run the calibration examples for all that follow
    for each in methods:
        search, fit = _searching(each, splits, model.n_layers, share), 0.0
        if each.name in families[:1]:
            search += FAMILY_PASSES * round(Choices().search_share * n_train)
        tried = 0.0 if each.name in READERS else 1.0 if search else thresholds
        if each.name in FAMILIES:
            tried = share
        shares = each.certifies and each.name not in READERS and (search > 0 or not whole)
        unsteered = 0 if shares and is_shared else 1
        is_shared = is_shared or shares
        prompts = (n_calibration * (unsteered + tried) + n_other) * each.certifies
        prompts += n_test * (each.name != "no_steering")
        if each.name == "optimal_probe":
            fit = FIT_SECONDS * model.n_layers * model.d_model**2
        looking = rate * search
        if config.search_budget is not None:
            looking = min(looking, seconds_of(config.search_budget))
        seconds[each.name] = rate * prompts + looking + fit
    return seconds


def _searching(method: Method, splits: Splits, n_layers: int, share: float) -> float:
    """Return the prompts that a method's search on training data runs."""
    choices, n_train = Choices(), len(splits.train)
    n_judge = round(choices.search_share * n_train)
    if splits.train.scored:
        return planned_replies(ReplyChoices(), n_layers, n_train) * method.certifies
    if method.name == "searched":
        trials = planned_trials(sum(choices.keep), n_judge, choices)
        return share * trials + EVERYWHERE * n_judge
    if method.name == "learned_strength":
        return (1 + share * FAMILY_TRIALS) * min(n_train - n_judge, MOST_TAUGHT)
    if method.name in FAMILIES:
        return share * FAMILY_TRIALS * n_judge
    return 0.0
