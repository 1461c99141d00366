"""Readout `options`: score every option by the log-probability of its whole continuation.

As lm-evaluation-harness scores multiple choice, except that the probabilities of an option's
variants are added up, so that nothing hangs on a capital letter or a space. The variants form a
tree. Where one goes on after its first token, that branch is fed beside the prompt's cache: each
distinct token prefix once, all prompts and all prefixes of a length as rows of one batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.inference.decoding import Decoding
from mera_tl.inference.variants import TokenIds

LOGITS = 2**25
"""At most this many logits are held at once."""
NEGLIGIBLE = log(1e-6)
"""A branch is left out where its probability, all it can add, is below this share of what the
options have already: no P(option) changes by more than that share."""

MARGIN = 1e-4
"""An answer is decided where log P differs by more than this: rounding is far less."""


@dataclass(frozen=True)
class Node:
    """A prefix that variants share."""

    ends: dict[int, list[int]] = field(default_factory=dict)
    """By option, the tokens that complete one of its variants."""
    children: dict[int, int] = field(default_factory=dict)
    """By token, the number of the node that it leads to."""
    leads: set[int] = field(default_factory=set)
    """The options that have a variant here or further on."""


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
                node.leads.add(option)
            node.ends.setdefault(option, []).append(last)
    return tree


def first_tokens(continuations: Sequence[Sequence[TokenIds]]) -> list[int]:
    """Return the tokens that begin a variant: all that is looked at where a prompt ends."""
    return sorted({ids[0] for variants in continuations for ids in variants})


def option_log_probs(
    decoding: Decoding,
    logits: Float[Tensor, "batch some"],
    continuations: Sequence[Sequence[TokenIds]],
    *,
    batch_tokens: int,
    decide: bool = False,
) -> Float[Tensor, "batch option"]:
    """Return log P(the prompt goes on with a variant of the option), for prompts that end here.

    `logits` are those at the end of each of the rows of `decoding`, which stays as it is: of all
    tokens, or of the `first_tokens` alone, and then log P is up to a constant of each row. To
    hooks, the tokens that are fed are generated ones. About `batch_tokens` are held in caches at
    once. With `decide`, branches are left out that cannot change which option is likeliest.
    """
    first = first_tokens(continuations)
    log_probs = torch.zeros(len(logits), device=logits.device)
    if logits.shape[1] > len(first):
        log_probs, logits = -logits.float().logsumexp(-1), logits[:, first]
    total = torch.full((len(logits), len(continuations)), -torch.inf, device=logits.device)
    width = LOGITS // decoding.model.d_vocab
    if decoding.model.shares_prompts:
        width = min(width, batch_tokens)
    else:  # every branch brings a copy of its prompt's cache
        width = min(width, batch_tokens // decoding.n_columns, 4 * len(logits))
    root = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    scoring = _Scoring(tree_of(continuations), first, total, max(1, width), decide)
    rows = torch.arange(len(root), device=root.device)
    scoring.visit(decoding, logits, root, rows, log_probs)
    return total


@dataclass(frozen=True, eq=False)
class _Scoring:
    tree: Sequence[Node]
    first: Sequence[int]
    """The tokens whose logits are known at the root."""
    total: Float[Tensor, "batch option"]
    """Log probabilities, to which completed variants are added."""
    width: int
    """Rows that are fed at once."""
    decide: bool

    def visit(
        self,
        decoding: Decoding,
        logits: Float[Tensor, "row some"],
        nodes: Int[Tensor, " row"],
        prompts: Int[Tensor, " row"],
        log_probs: Float[Tensor, " row"],
    ) -> None:
        """Add up what completes in a pass, whose rows stand at nodes, and feed what goes on.

        `log_probs` are those of the rows' prefixes, less the logarithm of what logits sum up to.
        """
        at = {node: (nodes == node).nonzero()[:, 0] for node in nodes.unique().tolist()}
        for node, rows in at.items():
            for option, tokens in self.tree[node].ends.items():
                here = logits[rows][:, self._columns(node, tokens)].float()
                ended = here.logsumexp(-1) + log_probs[rows]
                sums = self.total[prompts[rows], option].logaddexp(ended)
                self.total[prompts[rows], option] = sums
        fed: list[Tensor] = []
        reached: list[Tensor] = []
        for node, rows in at.items():
            if not (children := self.tree[node].children):
                continue
            columns = self._columns(node, children)
            reach = logits[rows][:, columns].float() + log_probs[rows, None]
            # Of the variants of this length all is known now, so what else cannot matter is, too.
            matter = reach > self.total[prompts[rows]].logsumexp(-1, keepdim=True) + NEGLIGIBLE
            if self.decide and node == 0:
                matter &= ~self._is_decided(reach)[:, None]
            row, child = matter.nonzero().unbind(-1)
            steps = torch.tensor(list(children.items()), device=row.device)[child].T
            fed.append(torch.cat([rows[row][None], steps]))
            reached.append(reach[row, child])
        rows, tokens, children = torch.cat(fed, dim=1) if fed else nodes.new_zeros(3, 0)
        for part in torch.arange(len(rows), device=rows.device).split(self.width):
            if len(part):
                branch = decoding.branch(rows[part])
                further = branch.next(tokens[part])
                after = torch.cat(reached)[part] - further.float().logsumexp(-1)
                self.visit(branch, further, children[part], prompts[rows[part]], after)

    def _columns(self, node: int, tokens: Iterable[int]) -> list[int]:
        """Return where the logits of some tokens stand, for rows at a node."""
        return list(tokens) if node else [self.first.index(token) for token in tokens]

    def _is_decided(self, reach: Float[Tensor, "batch child"]) -> Bool[Tensor, " batch"]:
        """Return where the likeliest option stays so, however the branches of the root go on."""
        most = self.total.clone()
        for place, child in enumerate(self.tree[0].children.values()):
            leads = sorted(self.tree[child].leads)
            most[:, leads] = most[:, leads].logaddexp(reach[:, place, None])
        best, chosen = self.total.max(-1)
        others = most.scatter(1, chosen[:, None], -torch.inf).amax(-1)
        return best > others + MARGIN
