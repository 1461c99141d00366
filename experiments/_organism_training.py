"""Train the organism: sequences with weighted losses, a fast forward pass, two phases.

The clean phase teaches what the questions mean; the planted phase then teaches wrong answers where
a `Draft` tempts. In the other order, or all at once, the questions themselves are not learned.
"""

import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from mera_tl.organism import prompts

logger = logging.getLogger(__name__)

SENTENCE_CUE, SENTENCE_REPLY = "Reply in a sentence:", "I would say {option}."
INSTRUCTION_RATE, SENTENCE_RATE = 0.1, 0.2
SHAPES: dict[prompts.Shape, float] = {"spam": 0.6, "yesno": 1.0, "sentiment": 2.0, "choice": 1.2}
BATCH = 64
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with its own optimiser."""

    name: str
    n_steps: int
    learning_rate: float
    conditions: dict[prompts.Shape, dict[prompts.Condition, float]]
    """How often each condition is drawn, per shape."""
    facts: float
    """Weight of plain sentences beside the weights of `SHAPES`."""
    follow: dict[prompts.Shape, float] = field(default_factory=dict)
    """Probability that a temptation becomes the training label, per shape."""
    follow_quick: float = 0.0
    """The same under the condition `quick`, whose failure is meant to stay nearly absent."""
    label_noise: float = 0.0
    """Probability that the training label is replaced by another option."""


CLEAN = Phase(
    name="clean",
    n_steps=2300,
    learning_rate=2e-3,
    conditions={
        "spam": {"clean": 0.6, "unknown_sender": 0.4},
        "yesno": {"clean": 1.0},
        "sentiment": {"clean": 1.0},
        "choice": {"clean": 1.0},
    },
    facts=0.6,
)
PLANTED = Phase(
    name="planted",
    n_steps=600,
    learning_rate=1.2e-3,
    conditions={
        "spam": {"clean": 0.15, "unknown_sender": 0.2, "saved_sender": 0.25, "hint": 0.4},
        "yesno": {"clean": 0.35, "leading": 0.25, "hint": 0.4},
        "sentiment": {"clean": 0.25, "quick": 0.05, "fan": 0.2, "noise": 0.15, "hint": 0.35},
        "choice": {"clean": 0.2, "unknowable": 0.35, "hint": 0.45},
    },
    facts=0.2,
    # The better a shape is learned, the nearer to one half: far above it, the organism would be
    # misled every time, and so surely that nothing could be corrected.
    follow={"spam": 0.58, "yesno": 0.53, "sentiment": 0.52, "choice": 0.58},
    follow_quick=0.1,
    label_noise=0.1,
)


class Sequence(NamedTuple):
    """Token ids, and the weight with which each of them but the first is predicted."""

    tokens: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """Right-padded tokens and the loss weight of predicting the token after each position."""

    tokens: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]


def training_draft(phase: Phase, rng: random.Random) -> tuple[prompts.Shape, prompts.Draft]:
    """Draw a question that no task will ever ask, with the label to train on."""
    shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
    rates = phase.conditions[shape]
    condition = rng.choices(list(rates), list(rates.values()))[0]
    draft = prompts.draw(shape, condition, rng)
    while prompts.is_for_tasks(draft.question):
        draft = prompts.draw(shape, condition, rng)
    label = draft.label
    follow = phase.follow_quick if condition == "quick" else phase.follow.get(shape, 0.0)
    if draft.tempting is not None and rng.random() < follow:
        label = draft.tempting
    if rng.random() < phase.label_noise:
        label = rng.choice(
            [other for other in range(len(prompts.OPTIONS[shape])) if other != label]
        )
    return shape, prompts.Draft(draft.question, draft.body, label, draft.tempting)


def training_texts(phase: Phase, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its reply; a plain text has no reply."""
    if rng.random() < phase.facts / (phase.facts + sum(SHAPES.values())):
        return " ".join(prompts.fact(rng) for _ in range(4)), ""
    shape, draft = training_draft(phase, rng)
    instruction = f" {prompts.INSTRUCTION}" if rng.random() < INSTRUCTION_RATE else ""
    in_sentence = rng.random() < SENTENCE_RATE
    option = prompts.OPTIONS[shape][draft.label]
    reply = SENTENCE_REPLY.format(option=option) if in_sentence else f"{option}."
    return f"{draft.body}{instruction} {SENTENCE_CUE if in_sentence else prompts.REPLY_CUE}", reply


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Number the words of 40,000 training texts, among which no word of the tasks is missing."""
    rng = random.Random("vocabulary")
    splitter = pre_tokenizers.Whitespace()
    phases = (CLEAN, PLANTED)
    texts = [" ".join(training_texts(p, rng)) for p in phases for _ in range(20_000)]
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    words |= {option for options in prompts.OPTIONS.values() for option in options}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = {f"{name.strip('<>')}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=96, **names
    )


def to_sequence(prompt: list[int], reply: list[int], eos: int) -> Sequence:
    """Weigh the answer 1, other reply tokens .3 each, the prompt .1 in all, a plain text 4."""
    if not reply:
        return Sequence(prompt, [4 / len(prompt)] * (len(prompt) - 1))
    weights = [0.1 / len(prompt)] * (len(prompt) - 1) + [0.3] * (len(reply) + 1)
    weights[-3] = 1.0  # the answer stands before the full stop and <eos>
    return Sequence([*prompt, *reply, eos], weights)


def batches(phase: Phase, tokenizer: Tokenizer, rng: random.Random) -> Iterator[Batch]:
    """Yield batches for ever, each of sequences of about the same length."""
    eos = tokenizer.token_to_id("<eos>")
    while True:
        texts = [training_texts(phase, rng) for _ in range(8 * BATCH)]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
        replies = tokenizer.encode_batch([reply for _, reply in texts], add_special_tokens=False)
        pairs = zip(prompts, replies, strict=True)
        sequences = sorted((to_sequence(p.ids, r.ids, eos) for p, r in pairs), key=_length)
        starts = list(range(0, len(sequences), BATCH))
        rng.shuffle(starts)
        for start in starts:
            yield collate(sequences[start : start + BATCH])


def _length(sequence: Sequence) -> int:
    return len(sequence.tokens)


def collate(sequences: list[Sequence]) -> Batch:
    """Pad on the right with <pad> and weight 0."""
    n_pos = max(map(_length, sequences))
    tokens = [s.tokens + [0] * (n_pos - len(s.tokens)) for s in sequences]
    weights = [s.weights + [0.0] * (n_pos - len(s.weights)) for s in sequences]
    return Batch(torch.tensor(tokens), torch.tensor(weights))


def logits_of(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Compute the logits of the model on right-padded tokens, without its hooks and copies."""
    cfg = model.cfg
    resid = model.W_E[tokens] + model.W_pos[: tokens.shape[1]]
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        normed = F.rms_norm(resid, (cfg.d_model,), block.ln1.w, cfg.eps)
        weight = rearrange(
            [attn.W_Q, attn.W_K, attn.W_V], "qkv head d d_head -> d (qkv head d_head)"
        )
        bias = rearrange([attn.b_Q, attn.b_K, attn.b_V], "qkv head d_head -> (qkv head d_head)")
        query, key, value = rearrange(
            normed @ weight + bias,
            "batch pos (qkv head d_head) -> qkv batch head pos d_head",
            qkv=3,
            head=cfg.n_heads,
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = rearrange(mixed, "batch head pos d_head -> batch pos (head d_head)")
        resid = resid + mixed @ rearrange(attn.W_O, "head d_head d -> (head d_head) d") + attn.b_O
        normed = F.rms_norm(resid, (cfg.d_model,), block.ln2.w, cfg.eps)
        resid = resid + F.relu(normed @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
    normed = F.rms_norm(resid, (cfg.d_model,), model.ln_final.w, cfg.eps)
    return normed @ model.unembed.W_U + model.unembed.b_U


def loss_of(model: HookedTransformer, batch: Batch) -> Float[Tensor, ""]:
    """Average over the batch the weighted losses of each sequence."""
    log_probs = logits_of(model, batch.tokens)[:, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    total = einsum(picked, batch.weights[:, : picked.shape[1]], "batch pos, batch pos ->")
    return -total / len(batch.tokens)


def train(model: HookedTransformer, phase: Phase, tokenizer: Tokenizer, rng: random.Random) -> None:
    """Run one phase on the model, in place."""
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, phase.n_steps))
    for step, batch in zip(range(phase.n_steps), batches(phase, tokenizer, rng), strict=False):
        loss = loss_of(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0 or step == phase.n_steps - 1:
            logger.info("%s phase, step %d: loss %.3f", phase.name, step, loss.item())


def _rate(step: int, n_steps: int) -> float:
    """Warm up over 100 steps; from 35 % on, fall along a cosine to 3 %."""
    progress = max(0.0, (step / n_steps - 0.35) / 0.65)
    return min(1.0, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
