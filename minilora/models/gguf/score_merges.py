"""The order of SentencePiece's merges, which a GGUF file stores as one score for each token.

SentencePiece and llama.cpp merge the two neighbours whose joined token has the highest score. If
several pairs have that score, they merge the leftmost. `tokenizers` has a list of pairs instead and
merges the first pair of the list that occurs. Both give the same tokens if no two tokens share a
score. Real vocabularies have ties: in Mistral's, all runs of spaces have the score -10^9.

Tied tokens that cannot meet in a text have their ids' order. Two of them can meet if one ends with
a part that the other begins with (ab and ba in "aba"), or if one is a part of the other. Then the
order depends on the text, which a list of pairs cannot express, with one exception: runs of one
character. For them this module lists the longest run first, so that a text's first run grows as far
as it can, as it does from left to right. `_merged_by_list` and `_merged_by_score` check this for
every length up to four times that of the longest run.
"""

from itertools import pairwise

_MAX_TOKEN_LENGTH = 128  # characters of a merged token; SentencePiece's have at most 16
_CHECKED_RUNS = 4  # times the longest run

Pair = tuple[str, str]


def merges_by_score(scores: dict[str, float], vocabulary: dict[str, int], where: str) -> list[Pair]:
    """List each way to cut each token into two parts, best score first.

    Args:
        scores: The score of each token that merges can make, in the order of their ids.
        vocabulary: Id of each token.
        where: Name of the file in error messages.

    Returns:
        The pairs in the order of their rank.

    Raises:
        ValueError: If a token is too long, has an unknown character, or has the same score as
            another token that it can meet in a text.
    """
    for token in scores:
        if len(token) > _MAX_TOKEN_LENGTH:
            raise ValueError(
                f"{where}: its tokenizer is damaged: a token of {len(token)} characters."
            )
    cuts: dict[str, list[Pair]] = {}
    for token in sorted(scores, key=lambda token: -scores[token]):  # equal scores stay in id order
        token_cuts = _cuts(token, vocabulary)
        for left, right in token_cuts:
            if left not in vocabulary or right not in vocabulary:
                raise ValueError(
                    f"{where}: the token {token!r} has a character that is not a token: "
                    "not supported."
                )
        if token_cuts:
            cuts[token] = token_cuts
    tied = _tied_tokens(cuts, scores)
    meeting = _meeting_runs(cuts, scores, tied, where)
    order = _longest_runs_first(list(cuts), meeting)
    merges = []
    for token in order:
        merges += cuts[token]
    for character in sorted({token[0] for token in meeting}):
        _check_runs(character, merges, scores, where)
    return merges


def _cuts(token: str, vocabulary: dict[str, int]) -> list[Pair]:
    """List the ways to cut a token into two parts that are tokens or single characters."""
    cuts = []
    for i in range(1, len(token)):
        left = token[:i]
        right = token[i:]
        left_fits = len(left) == 1 or left in vocabulary
        right_fits = len(right) == 1 or right in vocabulary
        if left_fits and right_fits:
            cuts.append((left, right))
    return cuts


def _tied_tokens(cuts: dict[str, list[Pair]], scores: dict[str, float]) -> set[str]:
    """Return the tokens that share their score with another token; `cuts` is ordered by score."""
    tied = set()
    for first, second in pairwise(cuts):
        if scores[first] == scores[second]:
            tied |= {first, second}
    return tied


def _meeting_runs(
    cuts: dict[str, list[Pair]], scores: dict[str, float], tied: set[str], where: str
) -> set[str]:
    """Return the tied runs of one character that can meet; other tokens that can are an error."""
    begins: dict[str, list[str]] = {}  # a part -> tied tokens that begin with it
    for token in cuts:
        if token in tied:
            for left in dict.fromkeys(left for left, _ in cuts[token]):
                begins.setdefault(left, []).append(token)
    runs = set()
    for token, pairs in cuts.items():
        rivals = []
        for left, right in pairs:
            if token in tied:
                neighbours = begins.get(right, [])
                rivals += [other for other in neighbours if scores[other] == scores[token]]
            # A tied token that is part of a better token lets that one be merged before its rivals.
            parts = [part for part in (left, right) if part in tied]
            rivals += [part for part in parts if scores[part] <= scores[token]]
        for rival in rivals:
            if rival == token:
                continue
            if set(token) != set(rival) or len(set(token)) > 1:
                raise ValueError(
                    f"{where}: the tokens {(token, rival)} have the same score, or one is a part "
                    "of the other and of another that has, so their order depends on the text: "
                    "not supported."
                )
            runs |= {token, rival}
    return runs


def _longest_runs_first(order: list[str], runs: set[str]) -> list[str]:
    """Return the tokens in order, but each character's runs among themselves by length."""
    by_character: dict[str, list[str]] = {}
    for token in sorted(runs, key=len):
        by_character.setdefault(token[0], []).append(token)
    return [by_character[token[0]].pop() if token in runs else token for token in order]


def _check_runs(character: str, merges: list[Pair], scores: dict[str, float], where: str) -> None:
    """Check that the list merges a text of one repeated character as the scores do."""
    ranks = {}
    lengths = {1}
    for rank, (left, right) in enumerate(merges):
        if set(left + right) == {character}:
            ranks[len(left), len(right)] = rank
            lengths.add(len(left + right))
    scores_by_length = {length: scores.get(character * length, 0.0) for length in lengths}
    for length in range(2, _CHECKED_RUNS * max(lengths)):
        by_list = _merged_by_list(length, ranks)
        if by_list != _merged_by_score(length, scores_by_length):
            raise ValueError(
                f"{where}: runs of {character!r} have the same score, and no list of merges cuts "
                f"{length} of them as SentencePiece does: not supported."
            )


def _merged_by_list(length: int, ranks: dict[tuple[int, int], int]) -> list[int]:
    """Return the lengths of the parts of a run; the pair with the lowest rank merges first."""
    parts = [1] * length
    while True:
        candidates = []
        for i, pair in enumerate(pairwise(parts)):
            if pair in ranks:
                candidates.append((ranks[pair], i))
        if not candidates:
            return parts
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _merged_by_score(length: int, scores: dict[int, float]) -> list[int]:
    """Return the lengths of the parts of a run; the best score merges first, then the leftmost."""
    parts = [1] * length
    while True:
        candidates = []
        for i, (left, right) in enumerate(pairwise(parts)):
            if left + right in scores:
                candidates.append((-scores[left + right], i))
        if not candidates:
            return parts
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
