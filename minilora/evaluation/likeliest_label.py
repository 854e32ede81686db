"""The likeliest of a closed set of answers, after each prompt.

    score(l) = Σ_j log p(l_j | prompt, l_<j)     over the tokens of label l and its end of turn

The score is a likelihood, so it is a sum: a mean over tokens would favour long labels with a
predictable end. All labels are read on top of the prompt's KV cache in one forward pass, as a tree:
labels with a common beginning share its nodes.

Most rows need less: a label scores at most its first token's log-probability. So if the whole score
of the best first token is above the first tokens of all other labels, that label wins (branch and
bound, exact).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minilora.common import order_by_length
from minilora.common.progress import ProgressBar
from minilora.generation.generate import check_lengths
from minilora.models.padded_batch import Context, inference, shared_prefix


class Labels:
    """Token ids of the L labels, as a tree: labels with a common beginning share nodes.

    A node is a proper beginning of a label. An edge leads from a node to a label's next token.

    Attributes:
        sizes: tokens of each label, (L,).
        padded: token ids, padded with 0 to the longest label, (L, J).
        tokens: last token of each node, (1, N).
        sees: True where node i has node j as a beginning, (N, N).
        owner: label of each edge, (E,).
        nodes: node at which each edge begins, (E,).
        nexts: token to which each edge leads, (E,).
    """

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        sizes = [len(label) for label in ids]
        self.sizes = torch.tensor(sizes)  # (L,)
        longest = max(sizes)
        padded = []
        beginnings: set[tuple[int, ...]] = set()
        for label in ids:
            padding = [0] * (longest - len(label))
            padded.append([*label, *padding])
            for length in range(1, len(label)):
                beginnings.add(tuple(label[:length]))
        self.padded = torch.tensor(padded)  # (L, J)
        heads = sorted(beginnings)
        number = {head: i for i, head in enumerate(heads)}
        last_tokens = [head[-1] for head in heads]
        self.tokens = torch.tensor([last_tokens])  # (1, N)
        sees = [_beginnings(head, heads) for head in heads]
        self.sees = torch.tensor(sees)  # (N, N)
        edges = []
        for owner, label in enumerate(ids):
            for j in range(1, len(label)):
                head = tuple(label[:j])
                edges.append((owner, number[head], label[j]))
        columns = torch.tensor(edges, dtype=torch.long).view(-1, 3).T  # (3, E)
        self.owner, self.nodes, self.nexts = columns

    def scores(self, context: Context, first: Tensor) -> Tensor:
        """Return the log-likelihood of every label, (B, L).

        Args:
            context: the KV caches of the B prompts.
            first: log-probabilities of the labels' first tokens, (B, L).
        """
        nexts = self.nexts[None]  # (1, E)
        tails = context.branch(self.tokens, self.sees, self.nodes, nexts)  # (B, E)
        tails = tails.cpu()
        return first.index_add(1, self.owner, tails)  # (B, L)

    def score_of(self, picked: Tensor, context: Context, first: Tensor) -> Tensor:
        """Return the log-likelihood of one label a row, (B,).

        Args:
            picked: the label of each row, (B,).
            context: the KV caches of the B prompts.
            first: log-probabilities of the labels' first tokens, (B, L).
        """
        tokens = self.padded[picked]  # (B, J)
        width = self.padded.shape[1] - 1
        places = torch.arange(width)  # (J-1,)
        line = torch.ones(width, width, dtype=torch.bool).tril()  # (J-1, J-1)
        tails = context.branch(tokens[:, :-1], line, places, tokens[:, 1:])  # (B, J-1)
        tails = tails.cpu()
        sizes = self.sizes[picked, None]  # (B, 1)
        tails = tails.where(places < sizes - 1, 0)  # (B, J-1)
        heads = first.gather(1, picked[:, None])  # (B, 1)
        return heads[:, 0] + tails.sum(-1)  # (B,)


def _beginnings(head: tuple[int, ...], heads: Sequence[tuple[int, ...]]) -> list[bool]:
    """Return for each of `heads` whether `head` begins with it."""
    return [head[: len(other)] == other for other in heads]


def choose(
    model: nn.Module, prompts: Sequence[list[int]], labels: Sequence[list[int]], batch_size: int
) -> list[int]:
    """Return the index of the label with the highest log-likelihood after each prompt.

    Args:
        model: a decoder.
        prompts: token ids of each prompt.
        labels: token ids of each label, end of turn included.
        batch_size: prompts in one forward pass; changes no result.

    Returns:
        One index a prompt; the first of equal labels.
    """
    longest = max(map(len, labels))
    check_lengths(model, prompts, longest)
    table = Labels(labels)
    best = [0] * len(prompts)
    order = order_by_length(prompts)
    with inference(model), ProgressBar("labels", len(order), "row") as bar:
        prefix, size = shared_prefix(model, prompts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            context = prefix.select([0] * len(batch))
            rests = [prompts[i][size:] for i in batch]
            logits = context.extend(rests)  # (B, V)
            log_p = logits.log_softmax(-1).cpu()  # (B, V)
            first = log_p[:, table.padded[:, 0]]  # (B, L)
            likeliest = _likeliest(context, first, table)
            for i, label in zip(batch, likeliest, strict=True):
                best[i] = label
            bar.update(len(batch))
    return best


def _likeliest(context: Context, first: Tensor, labels: Labels) -> list[int]:
    """Return the likeliest label of each row; score all labels only where necessary."""
    bound, best = first.max(-1)  # (B,), (B,)
    if labels.padded.shape[1] > 1:
        bound = labels.score_of(best, context, first)  # (B,)
        rivals = first >= bound[:, None]  # (B, L)
        rivals = rivals.scatter(1, best[:, None], False)  # (B, L)
        rows = rivals.any(-1).nonzero()[:, 0]  # (b,)
        if len(rows):
            context = context.select(rows.tolist())
            scores = labels.scores(context, first[rows])  # (b, L)
            best[rows] = scores.argmax(-1)
    return best.tolist()
