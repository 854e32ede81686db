"""The likeliest of a closed set of answers, after each prompt.

    score(l) = Σ_j log p(l_j | prompt, l_<j)     over the tokens of label l and its end of turn

The score is a likelihood, so it is a sum: a mean over tokens would favour long labels with a
predictable end. Labels are read on top of the prompt's KV cache in one forward pass, as a tree:
labels with a common beginning share its nodes.

A label scores at most its first token's log-probability, and the score of one label, the row's
reference, is known from the loss. So a label is read only if its first token alone is as likely as
the whole reference, the one with the likeliest first token before the others (branch and bound,
exact). A trained model needs few of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.common import batches_by_tokens
from minilora.models.padded_batch import Context


class Labels:
    """Token ids of the L labels, as a tree: labels with a common beginning share nodes.

    A node is a proper beginning of a label. An edge leads from a node to a label's next token.

    Args:
        ids: token ids of each label.

    Attributes:
        ids: token ids of each label.
        longest: tokens of the longest label.
        first: first token of each label, (L,).
        tokens: last token of each node, (N,).
        sees: True where node i has node j as a beginning, (N, N).
        paths: True where label l has node j as a beginning, (L, N).
        owner: label of each edge, (E,).
        nodes: node at which each edge begins, (E,).
        nexts: token to which each edge leads, (E,).
    """

    def __init__(self, ids: Sequence[list[int]]) -> None:
        self.ids = ids
        self.longest = max(map(len, ids))
        first_tokens = [label[0] for label in ids]
        self.first = torch.tensor(first_tokens)  # (L,)
        beginnings: set[tuple[int, ...]] = set()
        for label in ids:
            for length in range(1, len(label)):
                beginnings.add(tuple(label[:length]))
        heads = sorted(beginnings)
        number = {head: i for i, head in enumerate(heads)}
        last_tokens = [head[-1] for head in heads]
        longest_paths = [tuple(label[:-1]) for label in ids]
        self.tokens = torch.tensor(last_tokens, dtype=torch.long)  # (N,)
        self.sees = _begins_with(heads, heads)  # (N, N)
        self.paths = _begins_with(longest_paths, heads)  # (L, N)
        edges = []
        for owner, label in enumerate(ids):
            for j in range(1, len(label)):
                head = tuple(label[:j])
                edges.append((owner, number[head], label[j]))
        columns = torch.tensor(edges, dtype=torch.long).view(-1, 3).T  # (3, E)
        self.owner, self.nodes, self.nexts = columns

    def likeliest(self, context: Context, first: Tensor, known: Tensor, score: Tensor) -> list[int]:
        """Return the likeliest label after each prompt, the first of equal ones.

        Args:
            context: the KV caches of the B prompts.
            first: log-probabilities of the labels' first tokens, (B, L).
            known: a label of each row whose score is known, (B,).
            score: the scores of these labels, (B,).
        """
        scores = torch.full_like(first, float("-inf"))  # (B, L)
        scores.scatter_(1, known[:, None], score[:, None])
        for count in (1, len(self.ids)):  # the best rival of each row, which excludes most others
            is_rival = scores.isinf() & (first >= scores.amax(-1, keepdim=True))  # (B, L)
            rank = first.where(is_rival, float("-inf")).argsort(-1, descending=True).argsort(-1)
            self._score(context, first, is_rival & (rank < count), scores)
        return scores.argmax(-1).tolist()

    def _score(self, context: Context, first: Tensor, wanted: Tensor, scores: Tensor) -> None:
        """Write the log-likelihood of the wanted labels into `scores` (B, L)."""
        rows = wanted.any(-1).nonzero()[:, 0].tolist()
        sizes = self._needed(wanted[rows]).sum(-1).tolist()  # (b,)
        most = 2 * context.real.numel()  # tokens of a pass: a tree is often as large as its prompt
        for batch in batches_by_tokens(sizes, most):
            chosen = [rows[i] for i in batch]
            part = context
            if chosen != list(range(len(first))):
                part = context.select(chosen)
            found = self.scores(part, first[chosen], wanted[chosen])  # (b, L)
            scores[chosen] = scores[chosen].maximum(found)

    def _needed(self, wanted: Tensor) -> Tensor:
        """Return True for the nodes on the paths of the wanted labels, (B, N)."""
        return (wanted.float() @ self.paths.float()).gt(0)

    def scores(self, context: Context, first: Tensor, wanted: Tensor) -> Tensor:
        """Return the log-likelihood of the wanted labels, and -∞ for the others, (B, L).

        Args:
            context: the KV caches of the B prompts.
            first: log-probabilities of the labels' first tokens, (B, L).
            wanted: True for the labels to score, (B, L).
        """
        needed = self._needed(wanted)  # (B, N)
        width = int(needed.sum(-1).max())
        scores = first
        if width:
            # The nodes of each row come first, in the order of the tree. Others fill up its width.
            order = needed.int().argsort(dim=-1, descending=True, stable=True)  # (B, N)
            nodes = order[:, :width]  # (B, W)
            sees = self.sees[nodes[:, :, None], nodes[:, None]]  # (B, W, W)
            column = order.argsort(dim=-1)[:, self.nodes]  # (B, E)
            column = column.clamp_max(width - 1)  # an edge of an unwanted label may have no node
            tails = context.branch(self.tokens[nodes], sees, column, self.nexts[None])  # (B, E)
            scores = first.index_add(1, self.owner, tails.cpu())  # (B, L)
        return scores.where(wanted, float("-inf"))


def _begins_with(texts: Sequence[tuple[int, ...]], heads: Sequence[tuple[int, ...]]) -> Tensor:
    """Return where text i begins with head j, (texts, heads)."""
    table = torch.zeros(len(texts), len(heads), dtype=torch.bool)
    for i, text in enumerate(texts):
        for j, head in enumerate(heads):
            table[i, j] = text[: len(head)] == head
    return table
