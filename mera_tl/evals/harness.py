"""A model of lm-evaluation-harness that is run by our own engine, under a steering.

The harness's own models put hooks on without saying where a prompt ends or which columns are
padding, so numbers change with the batch size. Here every request is read as in `evaluate`.
"""

import logging
from functools import cached_property
from typing import Any

from mera_tl.certificate.description import describe
from mera_tl.evals.likelihood import Continuation, log_likelihoods
from mera_tl.inference.answers import ReadSettings
from mera_tl.models.chat import undated
from mera_tl.models.identity import identity_of
from mera_tl.models.model import Model
from mera_tl.steering.generation import Sampling, hooks_and_options, reply_to, text_of
from mera_tl.steering.steering import Steering
from mera_tl.storage import fingerprint

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "Standard benchmarks need lm-evaluation-harness: pip install 'mera-tl[evals]'."
    ) from error

MAX_NEW_TOKENS = 256
"""Of a reply whose task names no length; the harness's own default."""
_APPLIED = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}
logger = logging.getLogger(__name__)


class SteeredLM(TemplateLM):
    """`model` under `steering` (None: as it is), for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        ValueError: if the steering is not for this model, or depends on the unsteered answer and
            was not certified with options.
    """

    def __init__(
        self,
        model: Model,
        steering: Steering | None = None,
        *,
        settings: ReadSettings | None = None,
    ) -> None:
        super().__init__()
        self.model, self.settings = model, settings or ReadSettings()
        self.tokenizer = model.tokenizer
        self._steerings = [] if steering is None else [steering]
        self._hooks, self._options = hooks_and_options(model, steering)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @cached_property
    def tokenizer_name(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Name for the harness's cache of requests: folders of one name may hold other models."""
        told = identity_of(self.model), describe(self._steerings)
        return f"{self.model.name.replace('/', '__')}-{fingerprint(told)}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write turns as the tokenizer's chat template does."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **undated(self.tokenizer),
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return token ids; a text that begins with the first special token gets no second."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        **kwargs: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        pairs = [Continuation(tuple(context), tuple(rest)) for _, context, rest in requests]
        scored = [pair for pair in pairs if pair.continuation]
        found = iter(
            log_likelihoods(
                self.model, scored, self._hooks, options=self._options, settings=self.settings
            )
        )
        return [next(found) if pair.continuation else (0.0, True) for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Return the log-likelihood of whole texts, in windows as long as the model's context."""
        windows = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.model.n_ctx,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(window)) for window in rolling]
        sums = [0.0] * len(requests)
        values = self._loglikelihood_tokens(windows)
        for (number, *_), (value, _) in zip(windows, values, strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Return replies up to a stop text, greedy unless a task samples."""
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_sampling(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for sampling, numbers in groups.items():
            room = self.model.n_ctx - sampling.max_new_tokens
            contexts = [self.tok_encode(requests[i].args[0]) for i in numbers]
            prompts = [(ids or [self.prefix_token_id])[-max(1, room) :] for ids in contexts]
            rows = reply_to(
                self.model,
                prompts,
                self._hooks,
                sampling,
                options=self._options,
                settings=self.settings,
                is_traced=False,
            )
            for number, row in zip(numbers, rows, strict=True):
                texts[number] = text_of(self.model, row, sampling)
        return texts


def _sampling(kwargs: dict[str, Any]) -> Sampling:
    """Return how a task wants its replies drawn; warn of what it asks for and does not get."""
    if other := sorted(kwargs.keys() - _APPLIED):
        logger.warning("The task asks for %s, which is not applied.", ", ".join(other))
    until = kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(each for each in until if each)
    samples = kwargs.get("do_sample", bool(kwargs.get("temperature")))
    return Sampling(
        max_new_tokens=int(kwargs.get("max_gen_toks", MAX_NEW_TOKENS)),
        temperature=float(kwargs.get("temperature", 1.0)) if samples else 0.0,
        stop=until,
        top_k=int(kwargs.get("top_k") or 0),
        top_p=float(kwargs.get("top_p") or 1.0),
    )
