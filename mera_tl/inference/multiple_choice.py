"""Readout `options`: score every option by the log-probability of its whole continuation.

As lm-evaluation-harness scores multiple choice, except that the probabilities of an option's
variants are added up, so that nothing hangs on a capital letter or a space. The variants form a
tree. Where one goes on after its first token, that branch is fed to a copy of the prompt's cache:
each distinct token prefix once, all prompts and all prefixes of a length as rows of one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.inference.decoding import Decoding
from mera_tl.inference.variants import TokenIds

NEGLIGIBLE = log(1e-6)
"""A branch is left out where its probability, all it can add, is below this share of what the
options have already: no P(option) changes by more than that share."""


@dataclass(frozen=True)
class Node:
    """A prefix that variants share."""

    ends: dict[int, list[int]] = field(default_factory=dict)
    """By option, the tokens that complete one of its variants."""
    children: dict[int, int] = field(default_factory=dict)
    """By token, the number of the node that it leads to."""


def tree_of(continuations: Sequence[Sequence[TokenIds]]) -> list[Node]:
    """Arrange the variants of all options in a tree; the first node is its root."""
    tree = [Node()]
    for option, variants in enumerate(continuations):
        for *prefix, last in variants:
            node = tree[0]
            for token in prefix:
                if token not in node.children:
                    node.children[token] = len(tree)
                    tree.append(Node())
                node = tree[node.children[token]]
            node.ends.setdefault(option, []).append(last)
    return tree


def option_log_probs(
    decoding: Decoding,
    logits: Float[Tensor, "batch d_vocab"],
    continuations: Sequence[Sequence[TokenIds]],
    *,
    batch_tokens: int,
) -> Float[Tensor, "batch option"]:
    """Return log P(the prompt goes on with a variant of the option), for prompts that end here.

    `logits` are those at the end of each of the rows of `decoding`, which stays as it is. To hooks,
    the tokens that are fed are generated ones. About `batch_tokens` are held in caches at once.
    """
    total = torch.full((len(logits), len(continuations)), -torch.inf, device=logits.device)
    width = max(1, min(batch_tokens // decoding.n_columns, 4 * len(logits)))
    root = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    scoring = _Scoring(tree_of(continuations), total, width)
    scoring.visit(decoding, logits, root, torch.arange(len(root), device=root.device), root.float())
    return total


@dataclass(frozen=True, eq=False)
class _Scoring:
    tree: Sequence[Node]
    total: Float[Tensor, "batch option"]
    """Log probabilities, to which completed variants are added."""
    width: int
    """Rows that are fed at once."""

    def visit(
        self,
        decoding: Decoding,
        logits: Float[Tensor, "row d_vocab"],
        nodes: Int[Tensor, " row"],
        prompts: Int[Tensor, " row"],
        log_probs: Float[Tensor, " row"],
    ) -> None:
        """Add up what completes in a pass, whose rows stand at nodes, and feed what goes on."""
        log_probs = log_probs - logits.float().logsumexp(-1)
        at = {node: (nodes == node).nonzero()[:, 0] for node in nodes.unique().tolist()}
        for node, rows in at.items():
            for option, tokens in self.tree[node].ends.items():
                ended = logits[rows][:, tokens].float().logsumexp(-1) + log_probs[rows]
                sums = self.total[prompts[rows], option].logaddexp(ended)
                self.total[prompts[rows], option] = sums
        # Of the variants of this length all is known now, so what else cannot matter is, too.
        least = self.total.logsumexp(-1)[prompts] + NEGLIGIBLE
        fed: list[Tensor] = []
        for node, rows in at.items():
            for token, child in self.tree[node].children.items():
                matter = rows[logits[rows, token].float() + log_probs[rows] > least[rows]]
                step = matter.new_tensor([[token], [child]]).expand(2, len(matter))
                fed.append(torch.cat([matter[None], step]))
        if not fed:
            return
        rows, tokens, children = torch.cat(fed, dim=1)
        reached = logits[rows, tokens].float() + log_probs[rows]
        for part in torch.arange(len(rows), device=rows.device).split(self.width):
            branch = decoding.branch(rows[part])
            further = branch.next(tokens[part])
            self.visit(branch, further, children[part], prompts[rows[part]], reached[part])
