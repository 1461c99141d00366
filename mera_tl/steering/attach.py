"""Put steering hooks on the model that a user has, for the length of a `with` block.

Steering needs to know where it is: which columns of a pass are padding, and where the prompt ends.
Inside `evaluate` it is told. Elsewhere it follows from what the model is called with:

- the *attention mask* says what is padding, on either side;
- the length of the *cache* says which columns of the sequence a pass holds;
- a call of `generate` says how long the prompt is, for all passes that it makes, with or without a
  cache, for beams and several draws alike;
- outside `generate`, a pass on an empty cache is a prompt, and a single column on a cache is a
  generated token.

Where that is not enough (a batch without a mask, several columns on a cache outside `generate`) and
it matters for the scope of the steering, the pass is refused rather than steered somewhere else.
"""

import hashlib
import json
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mera_tl.inference.answers import ReadSettings, about_to_answer
from mera_tl.inference.decoding import Decoding, Window, hooked_pass
from mera_tl.inference.evaluation import check_answers
from mera_tl.inference.variants import OptionTokens
from mera_tl.models.hooks import FwdHooks
from mera_tl.models.hosts import Host, Pass, host_of
from mera_tl.models.model import Model
from mera_tl.steering.hook import DENSE, Move, Scope, SteerHook, relative_shift

_STEERED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""First layers of the models that have hooks of ours on."""
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    **dict.fromkeys(("min_new_tokens", "bad_words_ids", "suppress_tokens", "guidance_scale")),
    **dict.fromkeys(("begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty")),
}
"""Settings of `generate` under which it says what the model itself finds likeliest, as we do."""


@contextmanager
def attach_hooks(
    model: Any,
    fwd_hooks: FwdHooks,
    *,
    log: str | Path | None = None,
    options: OptionTokens | None = None,
    certified: bool = False,
) -> Iterator["Attachment"]:
    """Steer a model for the length of a `with` block; see `Steering.attach`.

    `model` is a `mera_tl.Model`, a `HookedTransformer`, a `TransformerBridge`, or any decoder-only
    causal language model of transformers. `fwd_hooks` are those of a `Steering`. Where these are
    `certified`, a `generate` that samples or penalises by the model's own settings is warned of.

    Raises:
        ValueError: if the model is steered already, has fewer layers than the hooks, or is none of
            these; where steering depends on the unsteered answer and `options` are missing; and,
            from within a pass of the model, where the place of the prompt cannot be known.
    """
    host = host_of(model)
    hooks = [hook for _, hook in fwd_hooks]
    _check(host, hooks, options)
    attachment = Attachment(host, hooks, options, None if log is None else Path(log), certified)
    _STEERED.add(host.layers[0])
    try:
        with ExitStack() as stack:
            for handle in attachment.put_on():
                stack.callback(handle)
            yield attachment
            attachment.finish()
    finally:
        _STEERED.discard(host.layers[0])
    attachment.warn_if_idle()


def _check(host: Host, hooks: Sequence[SteerHook], options: OptionTokens | None) -> None:
    if not hooks:
        raise ValueError("There are no hooks to attach; pass those of a Steering.")
    beyond = [hook.layer for hook in hooks if hook.layer >= len(host.layers)]
    if beyond:
        raise ValueError(
            f"This steering moves layer {beyond[0]}, but {host.name} has {len(host.layers)} "
            f"layers, numbered 0 to {len(host.layers) - 1}; attach it to the model it was made for."
        )
    is_one = len({hook.layer for hook in hooks}) == len(hooks)
    is_one = is_one and len({(hook.positions, hook.first_k) for hook in hooks}) == 1
    if host.layers[0] in _STEERED or not is_one:
        what = "is being steered already" if is_one else "was given hooks of several steerings"
        raise ValueError(
            f"{host.name} {what}; attach one steering at a time, since the effect of two at once "
            "is not what either was certified for."
        )
    if options is None and any(hook.per_answer for hook in hooks):
        raise ValueError(
            "This steering depends on the option that the model is about to answer; pass "
            "options=option_tokens(model, task, ReadSettings()) to say which those are."
        )
    if options is not None:
        check_answers(options.options, hooks)


# --- what the hooks did -------------------------------------------------------------------------


@dataclass(eq=False)
class Generation:
    """What steering did to the rows of one prompt pass and of the passes that continued it."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each row, without padding; empty where the model was given embeddings."""
    n_steered: Int[Tensor, " batch"]
    """(layer, token) pairs that were moved."""
    n_steerable: Int[Tensor, " batch"]
    """(layer, token) pairs in scope."""
    shift: Float[Tensor, " batch"]
    """Sum of |shift| / |h| over the moved pairs."""
    max_score: Float[Tensor, " batch"]
    """Highest score that a hook saw."""

    @classmethod
    def begin(
        cls, prompts: Sequence[Sequence[int]], n_rows: int, device: torch.device
    ) -> "Generation":
        """Return the counts before the first pass."""
        none = torch.zeros(n_rows, dtype=torch.long, device=device)
        shift = torch.zeros(n_rows, device=device)
        return cls(tuple(map(tuple, prompts)), none, none.clone(), shift, shift - torch.inf)

    @torch.no_grad()
    def add(self, moves: Sequence[Move]) -> None:
        """Take in what the hooks of one pass did, all layers at once."""
        device, inside = self.max_score.device, moves[0].scope.inside
        assert inside is not None  # every pass has a window here
        # Of several devices, that of the first steered layer.
        moved = torch.stack([each.moved.to(device) for each in moves])
        score = torch.stack([each.score.to(device) for each in moves])
        # Not in place: tensors of inference mode may be counted on outside of it.
        self.n_steered = self.n_steered + moved.sum((0, 2))
        self.n_steerable = self.n_steerable + len(moves) * inside.sum(-1)
        self.max_score = self.max_score.maximum(score.masked_fill(~inside, -torch.inf).amax((0, 2)))
        before = [each.before.flatten(0, -2) for each in moves if each.before is not None]
        after = [each.after.flatten(0, -2) for each in moves if each.after is not None]
        if after:
            old, new = (torch.cat([part.to(device) for part in parts]) for parts in (before, after))
            # Layer by layer and row by row, as the tokens that moved lie there.
            rows = moved.nonzero()[:, 1]
            self.shift = self.shift.index_add(0, rows, relative_shift(new, old))

    def records(self, n_prompts: int) -> Iterator[dict[str, Any]]:
        """Yield one record per prompt; its beams and draws are summed up."""
        group = max(1, len(self.max_score) // max(1, n_prompts))
        for start in range(0, len(self.max_score), group):
            rows = slice(start, start + group)
            ids = self.prompts[start] if self.prompts else ()
            n_steered = int(self.n_steered[rows].sum())
            yield {
                "prompt": hash_of_prompt(ids) if ids else None,
                "n_prompt": len(ids) or None,
                "n_steerable": int(self.n_steerable[rows].sum()),
                "n_steered": n_steered,
                "fired": n_steered > 0,
                "shift": float(self.shift[rows].sum()) / max(1, n_steered),
                "predicted_error": float(torch.sigmoid(self.max_score[rows].amax())),
            }


def hash_of_prompt(ids: Sequence[int]) -> str:
    """Return the SHA-256 of a prompt's token ids, written in decimal with commas between."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


# --- hooks on, and where they are ---------------------------------------------------------------


class Attachment:
    """Hooks on a model, and what they have done so far.

    `n_passes` counts forward passes, `n_calls` calls of hooks, `n_steered` the (layer, token) pairs
    that were moved, and `max_score` is the highest score seen.
    """

    def __init__(
        self,
        host: Host,
        hooks: Sequence[SteerHook],
        options: OptionTokens | None,
        log: Path | None,
        certified: bool,
    ) -> None:
        self._host, self._options, self._log = host, options, log
        self._hooks = [hook.to(host.device_of(hook.layer)) for hook in hooks]
        self._needs_place = any(h.positions != "all" or h.first_k is not None for h in hooks)
        self._per_answer = any(hook.per_answer for hook in hooks)
        self._moves: list[Move] = []
        self._latest = len(host.layers)
        self.n_passes = self.n_calls = self.n_steered = 0
        self.max_score = -torch.inf
        self._pass: Pass | None = None
        self._window: Window | None = None
        self._scope: Scope | None = None
        self._answers: Int[Tensor, " batch"] | None = None
        self._current: Generation | None = None
        self._tokens: Tensor | None = None
        self._n_prompt: int | None = None  # columns of the prompt that is being replied to
        self._n_prompts = 0  # and its prompts, each of which may have several rows
        self._is_generating = self._is_paused = False
        self._warns = certified

    def __repr__(self) -> str:
        moved = f"{self.n_steered:,} (layer, token) pairs moved"
        return f"Attachment({self._host.name}, {self.n_passes:,} passes, {moved})"

    def put_on(self) -> Iterator[Callable[[], None]]:
        """Register everything; yield how to take each off again."""
        host = self._host
        yield from (h.remove for h in host.watch(self._begin, {h.layer for h in self._hooks}))
        yield host.embed.register_forward_pre_hook(self._see_tokens).remove
        for hook in self._hooks:
            function = partial(self._steer, hook)
            yield host.layers[hook.layer].register_forward_hook(function).remove
        for owner in host.generators:
            own = vars(owner).get("generate")  # rarely: someone else has wrapped it for themselves
            owner.__dict__["generate"] = self._within(owner.generate)
            yield partial(_restore, owner, own)

    def _within(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `generate`, so that all its passes are known to belong to one prompt."""

        @wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._is_generating:  # a bridge calls the model that it wraps
                return generate(*args, **kwargs)
            self.finish()
            self._warn_of_settings(generate, kwargs)
            names = ("inputs_embeds", "inputs", "input_ids", "input")
            given = [kwargs.get(name) for name in names] + list(args[:1])
            tokens = next((t for t in given if isinstance(t, Tensor) and t.ndim > 1), None)
            self._n_prompt = None if tokens is None else tokens.shape[1]
            self._n_prompts = 0 if tokens is None else len(tokens)
            self._is_generating = True
            try:
                return generate(*args, **kwargs)
            finally:
                self._is_generating = False
                self.finish()

        return wrapped

    def _warn_of_settings(self, generate: Any, given: dict[str, Any]) -> None:
        """Say once what of the model's own settings no certificate was judged with.

        What a call says itself is its caller's choice.
        """
        config = getattr(getattr(generate, "__self__", None), "generation_config", None)
        if not self._warns or given.get("generation_config") is not None:
            return
        own = {name: getattr(config, name, None) for name in _GREEDY if name not in given}
        odd = [f"{n}={v!r:.40}" for n, v in own.items() if v not in (None, [], _GREEDY[n])]
        if odd:
            self._warns = False
            warnings.warn(
                f"{self._host.name} generates with {', '.join(odd)} of its own generation_config, "
                "and the certificate was judged without: it says nothing about such replies. Pass "
                + ", ".join(f"{n.split('=')[0]}={_GREEDY[n.split('=')[0]]}" for n in odd)
                + " to `generate` for what was certified.",
                stacklevel=3,
            )

    def _count(self) -> None:
        """Add up what the hooks did in the latest pass."""
        moves, self._moves = self._moves, []
        if not moves or self._current is None:
            return
        if len(moves[0].moved) == len(self._current.max_score):
            self._current.add(moves)
        else:  # rows have dropped out of the batch, and which is which is not known
            self.n_steered += sum(int(each.moved.sum()) for each in moves)

    def finish(self) -> None:
        """End the running generation, and log it."""
        self._count()
        current, self._current, self._answers = self._current, None, None
        self._n_prompt = None
        if current is None:
            return
        self.n_steered += int(current.n_steered.sum())
        self.max_score = max(self.max_score, float(current.max_score.amax()))
        if self._log is not None:
            records = current.records(self._n_prompts or len(current.max_score))
            lines = "".join(json.dumps(record) + "\n" for record in records)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(lines)

    def warn_if_idle(self) -> None:
        """Say so where hooks were on and nothing was steered: it looks like success otherwise."""
        if self.n_steered or not self.n_passes:
            return
        error = torch.tensor(self.max_score).sigmoid().item()
        reason = "no steered layer was run"
        if self.n_calls:
            reason = f"the highest predicted error was {error:.3f}" if error else "none in scope"
        warnings.warn(
            f"A steering was attached to {self._host.name} for {self.n_passes} forward passes and "
            f"moved no token: {reason}.",
            stacklevel=4,
        )

    # --- during a pass ---

    def _see_tokens(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        if not self._is_paused:
            self._tokens = args[0] if args else None

    def _begin(self, begun: Pass) -> None:
        if self._is_paused:
            return
        goes_on, self._latest = begun.layer > self._latest, begun.layer
        if goes_on:
            return
        if begun.layer < 0:
            self._tokens = None  # if embeddings are given, none will be seen
        self._count()
        self.n_passes += 1
        self._pass, self._window, self._scope = begun, None, None

    def _steer(self, hook: SteerHook, module: Any, args: Any, output: Any) -> Any:  # noqa: ARG002
        if self._is_paused:
            return None
        resid = output[0] if isinstance(output, tuple) else output
        if self._window is None or self._scope is None:
            self._window = self._describe(resid)
            self._scope = hook.scope(resid.shape[1], self._window)
        move = hook.move(resid, self._window, self._scope)
        self.n_calls += 1
        if move is None:
            return None
        self._moves.append(move)
        if move.score.numel() > DENSE:
            self._count()  # so that no two layers' activations of a long prompt are held
        if move.resid is resid:
            return None
        return (move.resid, *output[1:]) if isinstance(output, tuple) else move.resid

    def _describe(self, resid: Float[Tensor, "batch pos d_model"]) -> Window:
        """Work out where the columns of this pass are."""
        assert self._pass is not None
        n_rows, n_columns = resid.shape[:2]
        n_past, mask = self._pass.n_past, self._mask(n_rows, n_columns)
        n_prompt = self._prompt_columns(n_rows, n_columns)
        real = torch.ones(n_rows, n_columns, dtype=torch.bool, device=resid.device)
        ends = None
        if mask is not None:
            real = mask[:, n_past : n_past + n_columns].to(resid.device)
            ends = _row_ends(mask[:, : n_past + n_prompt], n_past) if n_prompt else None
        if self._current is None:
            prompts = [] if self._log is None else self._rows(real)
            self._current = Generation.begin(prompts, len(real), real.device)
        if self._per_answer and self._answers is None:
            self._answers = self._ask(real, n_prompt)
        begun = len(self._current.max_score)
        if begun != n_rows and (self._answers is not None or self._log is not None):
            needs = "the log" if self._answers is None else "a steering by the answer"
            raise ValueError(
                f"The batch changed from {begun} to {n_rows} rows while decoding, so which row is "
                f"of which prompt is not known, and {needs} must know; use `generate`."
            )
        n_before = max(0, n_past - (self._n_prompt or 0))
        return Window(real, n_prompt, self._answers, ends=ends, n_before=n_before)

    def _mask(self, n_rows: int, n_columns: int) -> Bool[Tensor, "batch all_pos"] | None:
        assert self._pass is not None
        mask, n_past = self._pass.mask, self._pass.n_past
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= n_past + n_columns:
            return mask.bool()
        # A single row is not padded, a decoded column is never padding, and `generate` (which drops
        # a mask of ones) goes on from the last column, whatever is on the left.
        is_clear = n_rows == 1 or (n_past > 0 and n_columns == 1) or self._is_generating
        needs = self._needs_place or self._per_answer
        if needs and not is_clear:
            what = "no attention mask" if mask is None else "a mask of another shape"
            raise ValueError(
                f"A batch of {n_rows} rows came with {what}, so where its prompts end is not "
                "known; pass attention_mask with one row per prompt (1 for tokens, 0 for padding)."
            )
        return None

    def _prompt_columns(self, n_rows: int, n_columns: int) -> int:
        """Return how many columns of this pass, from its first, belong to the prompt."""
        assert self._pass is not None
        n_past = self._pass.n_past
        if self._is_generating:
            if self._n_prompt is None:
                self._n_prompt = n_past + n_columns
            return max(0, self._n_prompt - n_past)
        if n_past == 0:
            self.finish()  # the next prompt of a loop that the user wrote
            self._n_prompts, self._n_prompt = n_rows, n_columns
            return n_columns
        if n_columns > 1 and self._needs_place:
            raise ValueError(
                f"{n_columns} columns came on a cache of {n_past}, so whether they are prompt or "
                "reply is not known; run the prompt in one pass, or use `generate`."
            )
        return 0

    def _rows(self, real: Bool[Tensor, "batch pos"]) -> list[tuple[int, ...]]:
        """Return the tokens of a pass without padding; none where it was given embeddings."""
        tokens = self._tokens
        if tokens is None or tokens.shape != real.shape:
            return []
        rows = zip(tokens, real.to(tokens.device), strict=True)
        return [tuple(row[is_real].tolist()) for row, is_real in rows]

    def _ask(self, real: Bool[Tensor, "batch pos"], n_prompt: int) -> Int[Tensor, " batch"]:
        """Return the option that each row is about to answer unsteered, each prompt run once."""
        assert self._pass is not None and self._options is not None
        rows = self._rows(real)
        if self._pass.n_past or n_prompt > real.shape[1] or not rows:
            raise ValueError(
                "This steering depends on the answer to the prompt, which must come as tokens, in "
                "one pass and on an empty cache."
            )
        self._is_paused = True
        try:
            with self._host.reader() as model:
                return unsteered_answers(model, rows, self._options)
        finally:
            self._is_paused = False


@torch.no_grad()
def unsteered_answers(
    model: Model, prompts: Sequence[tuple[int, ...]], options: OptionTokens
) -> Int[Tensor, " prompt"]:
    """Return the option that a model is about to answer to each prompt; equal ones are run once."""
    distinct = list(dict.fromkeys(prompts))
    with hooked_pass(model, ()):
        decoding = Decoding(model, distinct, ())
        answers = about_to_answer(decoding, decoding.prompt(), options, settings_of(options))
    place = {prompt: number for number, prompt in enumerate(distinct)}
    return answers[[place[prompt] for prompt in prompts]]


def settings_of(options: OptionTokens) -> ReadSettings:
    """Return how these tokens are read where a prompt ends: as whole options, or one each."""
    return ReadSettings("options" if options.continuations else "last")


def _row_ends(mask: Bool[Tensor, "batch pos"], n_past: int) -> Int[Tensor, " batch"] | None:
    """Return where the prompts end, row by row; None where all end at the last column."""
    if bool(mask[:, -1].all()):
        return None
    column = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return ((mask * column).amax(-1) - n_past).clamp(min=0)


def _restore(owner: Any, generate: Callable[..., Any] | None) -> None:
    if generate is None:
        del owner.__dict__["generate"]
    else:
        owner.__dict__["generate"] = generate
