"""Tests of mix_datasets and train_test_split.

A mixture has exactly the requested proportions, and no group is on both sides of a split. Oracle:
counting, and shares computed by hand. Properties: shares by the largest remainder; the rows of a
repeated dataset appear equally often or once more; a row stays on its side of a split when other
rows are added. Round trip: paths. Errors.
"""

import json
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from helpers.toy import Letters
from minilora.cli.main import main
from minilora.data import encode_dataset
from minilora.data.mixture import shares


def letters(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]


def sources(rows) -> Counter:
    return Counter(row["prompt"][0] for row in rows)


# ---- oracle


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [0.8, 0.2], [8, 2]),
        (10, [1, 1, 1], [4, 3, 3]),
        (7, [0.1, 0.2, 0.7], [1, 1, 5]),  # 0.7, 1.4, 4.9
        (10**6, [0.1, 0.2, 0.7], [10**5, 2 * 10**5, 7 * 10**5]),
        (0, [1, 2], [0, 0]),
    ],
)
def test_shares_by_hand(total, weights, expected):
    assert shares(total, [Fraction(str(weight)) for weight in weights]) == expected


def test_a_mixture_has_its_proportions_and_reports_them():
    mixed = ml.mix_datasets([(letters("a", 100), 0.8), (letters("b", 7), 0.2)], rows=60)
    assert sources(mixed) == {"a": 48, "b": 12}
    often = Counter(row["prompt"] for row in mixed)
    # a is cut, and b is repeated
    assert set(often.values()) == {1, 2} and len(often) == 48 + 7
    report = encode_dataset(mixed, Letters()).report
    assert report.sources == {"set 0": (48, report.tokens - 60), "set 1": (12, 60)}
    assert "  12 rows, 60 tokens from set 1" in str(report)
    assert report.unused_keys == ()


def test_without_a_row_count_no_row_repeats_and_one_dataset_is_complete():
    mixed = ml.mix_datasets([(letters("a", 100), 3), (letters("b", 10), 1)])
    assert sources(mixed) == {"a": 30, "b": 10} and len({row["prompt"] for row in mixed}) == 40


# ---- property


@given(st.integers(0, 1000), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_shares_are_within_one_of_exact(total, weights):
    found = shares(total, [Fraction(weight) for weight in weights])
    assert sum(found) == total
    assert all(
        abs(count - total * weight / sum(weights)) < 1
        for count, weight in zip(found, weights, strict=True)
    )


@given(
    st.lists(st.tuples(st.integers(10, 19), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(40, 90),
)
def test_rows_of_a_dataset_appear_equally_often_or_once_more(sets, rows):
    parts = [(letters("abcd"[i], count), weight) for i, (count, weight) in enumerate(sets)]
    mixed = ml.mix_datasets(parts, rows=rows, seed=3)
    assert len(mixed) == rows and ml.mix_datasets(parts, rows=rows, seed=3) == mixed
    for i, (count, _) in enumerate(sets):
        often = Counter(row["prompt"] for row in mixed if row["prompt"][0] == "abcd"[i])
        assert len(often) == min(count, often.total())
        assert max(often.values()) - min(often.values()) <= 1
    whole = ml.mix_datasets(parts)
    assert max(Counter(row["prompt"] for row in whole).values()) == 1


def test_different_seeds_give_different_mixtures():
    parts = [(letters("a", 50), 1), (letters("b", 50), 1)]
    assert ml.mix_datasets(parts, seed=1) != ml.mix_datasets(parts, seed=2)


rows_of = st.lists(
    st.fixed_dictionaries({"text": st.text(max_size=3), "user": st.integers(0, 30)}), min_size=60
)


@given(rows_of, st.integers(0, 5))
def test_a_split_keeps_all_rows_and_their_sides_when_rows_are_added(rows, seed):
    half = rows[: len(rows) // 2]
    try:
        before, after = (ml.train_test_split(some, test=0.5, seed=seed) for some in (half, rows))
    except ValueError as error:
        assert "rows held out" in str(error)
        return
    order = {id(row): i for i, row in enumerate(rows)}
    assert sorted(order[id(row)] for side in after for row in side) == list(range(len(rows)))
    assert all(row in after[side] for side in (0, 1) for row in before[side])
    assert not [row for row in after[0] if row in after[1]]  # equal rows are on one side


@given(rows_of)
def test_no_group_is_on_both_sides(rows):
    for by in ("user", lambda row: row["user"] // 2):
        try:
            train, test = ml.train_test_split(rows, test=0.5, by=by)
        except ValueError as error:
            assert "rows held out" in str(error)
            continue
        group = by if callable(by) else lambda row: row["user"]
        assert not {group(row) for row in train} & {group(row) for row in test}


def test_the_test_share_of_a_split_is_close_to_the_requested_one():
    train, test = ml.train_test_split(letters("a", 10_000), test=0.1)
    # 120 rows are four standard deviations
    assert abs(len(test) - 1000) < 120 and len(train) + len(test) == 10_000
    sides = ml.train_test_split(letters("a", 20) * 5, test=0.5)
    assert not [row for row in sides[0] if row in sides[1]]  # equal rows are on one side
    assert ml.train_test_split(letters("a", 50), test=0.3, seed=1) != ml.train_test_split(
        letters("a", 50), test=0.3, seed=2
    )
    assert ml.train_test_split([{"b": 1, "a": n} for n in range(50)]) == ml.train_test_split(
        [{"a": n, "b": 1} for n in range(50)]
    )


# ---- round trip


def test_paths_and_the_mix_option_give_the_same_mixture(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in letters(name, 40))
        )
    expected = ml.mix_datasets({paths[0]: 1, paths[1]: 0.25}, rows=20, seed=7)
    assert sources(expected) == {"a": 16, "b": 4} and {row.source for row in expected} == set(paths)
    seen = []
    monkeypatch.setattr(ml, "load_tokenizer", lambda _: Letters())
    for name in ("load_model", "inject", "count_parameters", "save_adapter", "write_model_card"):
        monkeypatch.setattr(ml, name, lambda *_, **__: None)
    monkeypatch.setattr(
        ml, "train", lambda model, tokenizer, dataset, *_, **__: seen.append(dataset) or result()
    )
    run = ["train", "model", paths[0], "--mix", paths[1], "0.25", "--mix_rows", "20", "--seed", "7"]
    assert main(run) == 0 and seen == [expected]
    assert main(run[:3]) == 0 and seen[1] == paths[0]


def result() -> SimpleNamespace:
    return SimpleNamespace(interrupted=False, steps=1, loss=1.0, eval_loss=None, evals=[])


# ---- errors


@pytest.mark.parametrize(
    ("parts", "rows", "message"),
    [
        ([], None, r"expected \(dataset, weight\) pairs with weights above 0, got \[\]"),
        ([(letters("a", 2), 0)], None, "above 0, got .0."),
        ([(letters("a", 2), float("inf"))], None, "above 0, got .inf."),
        ([(letters("a", 2), float("nan"))], None, "above 0, got .nan."),
        ([(letters("a", 9), 0.99), (letters("b", 9), 0.01)], 3, "set 1 has no share in 3 rows"),
        ([(letters("a", 9), 1)], -3, "set 0 has no share in -3 rows"),
        ([([], 1)], None, "is empty"),
    ],
)
def test_mix_datasets_refuses_bad_parts(parts, rows, message):
    with pytest.raises(ValueError, match=message):
        ml.mix_datasets(parts, rows=rows)


def test_train_test_split_refuses_bad_arguments(capsys):
    for share in (0, 1.0, True, -0.1, float("nan")):
        with pytest.raises(ValueError, match="test is a share between 0 and 1"):
            ml.train_test_split(letters("a", 9), test=share)
    with pytest.raises(
        ValueError, match=r"row 0 has no 'user': its keys are \['prompt', 'completion'\]"
    ):
        ml.train_test_split(letters("a", 9), by="user")
    with pytest.raises(ValueError, match="0 of 1 rows held out. Take another"):
        ml.train_test_split(letters("a", 1), test=0.001)
    assert main(["train", "model", "rows.jsonl", "--mix_rows", "3"]) == 1
    assert "--mix is missing" in capsys.readouterr().err
