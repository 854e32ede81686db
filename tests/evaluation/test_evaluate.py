"""Tests of `evaluate`: losses, generated answers and the likeliest label.

Oracle: the loss of transformers; the likelihood of each label from one forward pass over the whole
sequence; F1 by hand. Property: batch size and order of rows do not change a score; the tree of
labels and its shortcut choose the same label as the full table, for random labels with common
beginnings. Errors: invalid rows, labels and names. Likelihoods are sums of up to ten fp32
log-probabilities of about 10, so 1e-4 is a hundred roundings.
"""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora.evaluation.evaluate as evaluate_module
import minilora.evaluation.likeliest_label as label_module
import minilora.models.padded_batch as context_module
from helpers.chats import chat, ours, theirs
from helpers.tiny import RECURRENT, oracle, tokens, twin
from minilora.data import encode_dataset, encode_prompt, split_prompt
from minilora.evaluation.evaluate import evaluate, label_table
from minilora.evaluation.likeliest_label import Labels
from minilora.evaluation.metrics import exact_match, json_valid, token_f1
from minilora.evaluation.read_once import Readings
from minilora.evaluation.scores import ScoredRow, Scores
from minilora.generation.generate import generate
from minilora.models.padded_batch import Context, inference

VOCABULARY = 300
THEIRS = oracle(vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=None)
MINE = twin(THEIRS)
TOKENIZER = ours("chatml")
LABELS = ["hello", "hello world", "he", "world", "as", "a"]
ROWS: list[dict[str, Any]] = [
    {"messages": chat("hi", "hello")},
    {
        "messages": chat(
            "what is said to the world, at length and in full?", "hello world", system="be short"
        )
    },
    {
        "prompt": [{"role": "user", "content": "as"}],
        "completion": [{"role": "assistant", "content": "as"}],
    },
    {"instruction": "name", "input": "him", "output": "he"},
    {"messages": chat("hi", "as", "and?", "world")},
]


def plain_scores(model, prompt: list[int], labels) -> torch.Tensor:
    """Return the log-likelihood of each label, with one full forward pass per label."""
    scores = []
    for label in labels:
        with torch.no_grad():
            out = model(torch.tensor([[*prompt, *label]]))
        p = getattr(out, "logits", out)[0].log_softmax(-1)
        scores.append(sum(p[len(prompt) - 1 + j, token] for j, token in enumerate(label)))
    return torch.stack(scores)


# ---- loss


def test_loss_equals_the_loss_of_transformers():
    """The loss is a mean over tokens: sum of (mean loss of a row x its trained tokens) / tokens."""
    total, count = 0.0, 0
    for example in encode_dataset(ROWS, TOKENIZER):
        with torch.no_grad():
            loss = THEIRS(
                torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])
            ).loss
        total, count = total + loss.item() * example.trained_tokens, count + example.trained_tokens
    for model in (MINE, THEIRS):
        scores = evaluate(model, TOKENIZER, ROWS, max_new_tokens=0)
        assert scores.tokens == count and scores.n == scores.answers == len(ROWS)
        assert scores.loss == pytest.approx(total / count, rel=1e-6)
        assert scores.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
        assert scores.exact_match is None and scores.predictions == []


def test_no_batch_size_or_order_changes_a_score():
    first = evaluate(MINE, TOKENIZER, ROWS, labels=LABELS, max_new_tokens=8, batch_size=5)
    for batch_size in (1, 2, 16):
        again = evaluate(
            MINE, TOKENIZER, ROWS[::-1], labels=LABELS, max_new_tokens=8, batch_size=batch_size
        )
        assert again.loss == pytest.approx(first.loss, rel=1e-6)  # sums of fp32 in another order
        assert again.predictions == first.predictions[::-1] and again.choices == first.choices[::-1]
        assert again.as_dict() == pytest.approx(first.as_dict(), rel=1e-5)


def test_text_rows_have_a_loss_only():
    scores = evaluate(MINE, TOKENIZER, [{"text": "hello world"}, {"text": "as"}])
    assert scores.n == 2 and scores.answers == 0 and scores.loss > 0
    assert scores.exact_match is scores.token_f1 is scores.label_accuracy is None
    mixed = evaluate(MINE, TOKENIZER, [{"text": "hello world"}, ROWS[0]], max_new_tokens=4)
    assert mixed.n == 2 and mixed.answers == 1 and mixed.references == ["hello"]


# ---- greedy answers


def test_a_recurrent_model_reads_its_answers_apart_from_its_loss():
    """Its state cannot forget a reference, so a row is not read once."""
    model = oracle(vocab_size=VOCABULARY, max_position_embeddings=256, **RECURRENT)
    prompts = [split_prompt(row)[0] for row in ROWS]
    scores = evaluate(model, TOKENIZER, ROWS, max_new_tokens=6, batch_size=2)
    assert scores.loss == pytest.approx(evaluate(model, TOKENIZER, ROWS, max_new_tokens=0).loss)
    assert scores.predictions == generate(model, TOKENIZER, prompts, max_new_tokens=6)
    alone = [generate(model, TOKENIZER, prompt, max_new_tokens=6) for prompt in prompts]
    assert scores.predictions == alone
    with pytest.raises(ValueError, match="recurrent layers.*Leave the labels out"):
        evaluate(model, TOKENIZER, ROWS, labels=LABELS)


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, theirs("chatml")], ids=["minilora", "transformers"]
)
def test_predictions_are_the_answers_of_generate(tokenizer):
    prompts = [split_prompt(row)[0] for row in ROWS]
    answers = generate(MINE, tokenizer, prompts, max_new_tokens=6)
    rows = [
        {"messages": [*p, {"role": "assistant", "content": a}]}
        for p, a in zip(prompts[:3], answers, strict=False)
    ]
    scores = evaluate(
        MINE,
        tokenizer,
        [*rows, *ROWS[3:]],
        max_new_tokens=6,
        metrics={"length": lambda p, r: len(p)},
    )
    assert scores.predictions == answers
    assert scores.references == [*answers[:3], "he", "world"]
    assert scores.exact_match == pytest.approx(3 / 5)
    assert scores.token_f1 == pytest.approx(sum(map(token_f1, answers, scores.references)) / 5)
    assert scores.metrics == {"length": sum(map(len, answers)) / 5}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("<think>\n\n</think>\n\nyes", 1.0),  # what was trained
        ("yes", 1.0),  # the row's own answer
        ("<think>\n\n</think>\n\nno", 0.0),
        ("<think>\nhm\n</think>\n\nyes", 0.0),
        ("<think>\n\n</think>", 0.0),
    ],
)
def test_an_answer_is_compared_with_what_was_trained(monkeypatch, answer, score):
    """Qwen3's template writes an empty block of thoughts in front of the last answer."""
    tokenizer = ours("qwen3")
    ids = tokenizer.encode(answer)
    monkeypatch.setattr(evaluate_module, "read_once", lambda *given: Readings(1.0, 1, [], [ids]))
    row = {"messages": chat("is it?", "yes")}
    seen = []
    metrics = {"seen": lambda *pair: seen.append(pair) or 0.0}
    scores = evaluate(MINE, tokenizer, [row], metrics=metrics)
    assert scores.exact_match == score
    assert scores.references == ["<think>\n\n</think>\n\nyes"] and scores.predictions == [answer]
    if score:
        assert [text.strip() for text in seen[0]] == ["yes", "yes"]


def test_json_of_a_thinking_template_is_valid(monkeypatch):
    tokenizer = ours("qwen3")
    ids = tokenizer.encode('<think>\n\n</think>\n\n{"a": 1}')
    monkeypatch.setattr(evaluate_module, "read_once", lambda *given: Readings(1.0, 1, [], [ids]))
    row = {"messages": chat("is it?", '{"a": 1}')}
    scores = evaluate(MINE, tokenizer, [row], metrics={"valid": json_valid})
    assert scores.metrics == {"valid": 1.0} and scores.token_f1 == 1


def test_thoughts_of_the_row_belong_to_its_reference(monkeypatch):
    tokenizer = ours("qwen3")
    messages = chat("is it?", "yes")
    messages[1]["reasoning_content"] = "hm"
    trained = "<think>\nhm\n</think>\n\nyes"
    ids = tokenizer.encode(trained)
    monkeypatch.setattr(evaluate_module, "read_once", lambda *given: Readings(1.0, 1, [], [ids]))
    scores = evaluate(MINE, tokenizer, [{"messages": messages}])
    assert scores.exact_match == 1 and scores.references == [trained]


def test_metrics_by_hand():
    assert (
        exact_match(" Paris\n", "Paris") == 1
        and exact_match("paris", "Paris") == exact_match("Paris.", "Paris") == 0
    )
    cases = {
        ("The Denver Broncos!", "denver broncos"): 1.0,
        ("Denver Broncos won", "the Broncos"): 2 * (1 / 3) * 1 / (1 / 3 + 1),
        ("a b b c", "b b b d"): 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4),  # "a" is an article
        ("Paris", "London"): 0.0,
        ("", "the"): 1.0,  # neither has a word
        ("", "Paris"): 0.0,
    }
    for (prediction, reference), expected in cases.items():
        assert token_f1(prediction, reference) == pytest.approx(expected)
        assert token_f1(reference, prediction) == pytest.approx(expected)


def test_scores_print_and_convert_to_a_dict():
    scores = Scores(
        4, 10, 2.0, math.exp(2.0), 4, 0.5, 0.75, metrics={"valid": 1.0}, predictions=["x"]
    )
    assert scores.as_dict() == {
        "n": 4, "tokens": 10, "loss": 2.0, "perplexity": math.exp(2.0), "answers": 4,
        "exact_match": 0.5, "token_f1": 0.75, "valid": 1.0,
    }  # fmt: skip
    assert scores.interval(0.5) == pytest.approx(0.49)  # 1.96 * sqrt(0.25 / 4)
    lines = str(scores).splitlines()
    assert len(lines) == 8 and "exact match" in str(scores) and "0.5000  ± 0.4900" in str(scores)


# ---- rows


def test_rows_hold_the_answer_and_each_score():
    metrics = {"length": lambda answer, reference: float(len(answer))}
    scores = evaluate(MINE, TOKENIZER, ROWS, labels=LABELS, max_new_tokens=4, metrics=metrics)
    assert [row.row for row in scores.rows] == list(range(len(ROWS)))
    assert [row.got for row in scores.rows] == scores.predictions
    assert [row.expected for row in scores.rows] == scores.references
    assert [row.choice for row in scores.rows] == scores.choices
    for name in ("exact_match", "token_f1", "label_accuracy", "length"):
        mean = math.fsum(row.scores[name] for row in scores.rows) / len(ROWS)
        assert scores.as_dict()[name] == mean
    ranked = scores.worst(len(ROWS), by="length")
    lengths = [row.scores["length"] for row in ranked]
    assert lengths == sorted(lengths) and len(scores.worst(2)) == 2
    with pytest.raises(ValueError, match="'lenght' matches nothing. Nearest: 'length'"):
        scores.worst(1, by="lenght")


def test_named_metrics_are_measured_alone():
    scores = evaluate(MINE, TOKENIZER, ROWS, max_new_tokens=2, metrics=["f1", "json_valid"])
    assert scores.exact_match is None and scores.token_f1 is not None
    assert scores.metrics.keys() == {"json_valid"}
    with pytest.raises(ValueError, match="metrics: 'exact' matches nothing"):
        evaluate(MINE, TOKENIZER, ROWS, metrics="exact")


def scored(*values: float) -> Scores:
    """Return scores whose rows have these values of the exact match."""
    rows = []
    for number, value in enumerate(values):
        rows.append(ScoredRow(number, "<p>", "a", "b", None, {"exact_match": value}))
    mean = sum(values) / len(values)
    return Scores(len(values), 9, 1.0, math.e, len(values), exact_match=mean, rows=rows)


def test_comparison_counts_better_and_worse_rows():
    comparison = scored(1, 1, 0, 1).compare(scored(0, 0, 1, 1))
    assert comparison.changed("exact_match") == (2, 1)
    (line,) = [line for line in str(comparison).splitlines() if line.startswith("exact")]
    assert line.split()[2:] == ["0.5000", "0.7500", "+0.2500", "2", "1"]
    assert comparison._repr_html_().count("<tr>") == len(str(comparison).splitlines())
    with pytest.raises(ValueError, match="same rows"):
        scored(1, 0).compare(scored(1, 0, 0))


def test_written_rows_are_read_back(tmp_path):
    scores = scored(1, 0)
    scores.write(tmp_path / "rows.jsonl", scored(0, 0))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["scores"]["exact_match"] for line in lines] == [1, 0]
    assert [line["compared"]["scores"]["exact_match"] for line in lines] == [0, 0]
    assert lines[0].items() >= {"row": 0, "prompt": "<p>", "expected": "a", "got": "b"}.items()


# ---- constrained choice


@pytest.mark.parametrize("model", [MINE, THEIRS], ids=["minilora", "transformers"])
def test_choices_are_the_argmax_of_full_sequence_likelihoods(model):
    pairs = [split_prompt(row) for row in ROWS]
    prompts = [encode_prompt(prompt, TOKENIZER) for prompt, _ in pairs]
    ids = [[*TOKENIZER.encode(label), TOKENIZER.eos_token_id] for label in LABELS]
    expected = [LABELS[plain_scores(model, prompt, ids).argmax()] for prompt in prompts]
    scores = evaluate(model, TOKENIZER, ROWS, labels=LABELS, max_new_tokens=0, batch_size=2)
    assert scores.choices == expected
    assert scores.label_accuracy == sum(
        c == answer for c, (_, answer) in zip(expected, pairs, strict=True)
    ) / len(ROWS)
    # the table includes the end-of-turn token
    assert label_table(LABELS, TOKENIZER, pairs[0][0], len(prompts[0])) == ids


# Few different tokens, so that many labels have common beginnings.
LABEL = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


def in_context(prompts: list[list[int]], labels) -> tuple[Labels, Context, torch.Tensor]:
    """Return the tree of labels, the prompts that were read, and the labels' first tokens there."""
    table = Labels([list(label) for label in labels])
    context = Context(MINE)
    logits = context.extend(prompts)  # (B, V)
    return table, context, logits.log_softmax(-1)[:, table.first]


@settings(max_examples=25)
@given(st.lists(LABEL, min_size=2, max_size=9, unique=True), st.integers(0, 99), st.integers(0, 99))
def test_every_score_is_the_likelihood_of_the_full_sequence(labels, seed, known):
    """A tree of any labels gives their likelihoods, and `likeliest` takes the arg-max of all."""
    prompts = [tokens(1, n, seed=seed + n)[0].tolist() for n in (3, 9, 4, 1)]
    expected = torch.stack([plain_scores(MINE, prompt, labels) for prompt in prompts])  # (B, L)
    wanted = torch.rand(expected.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    wanted[0, 0] = True
    given_label = (torch.arange(4) + known) % len(labels)
    given_score = expected[torch.arange(4), given_label]
    with inference(MINE):
        table, context, first = in_context(prompts, labels)
        scores = table.scores(context, first, wanted)
        chosen = table.likeliest(context, first, given_label, given_score)
    torch.testing.assert_close(scores[wanted], expected[wanted], atol=1e-4, rtol=0)
    assert (scores[~wanted] == -math.inf).all()
    best = expected.max(-1).values
    assert (expected[torch.arange(4), chosen] >= best - 1e-4).all()


def test_only_labels_that_may_be_likelier_than_the_reference_are_read(monkeypatch):
    """The bound of a label is its first token. The best rival is read before the others."""
    prompts = [tokens(1, 6, seed=seed)[0].tolist() for seed in range(40)]
    read = []
    branch = Context.branch
    monkeypatch.setattr(
        Context, "branch", lambda self, *tree: (read.append(tree[0]), branch(self, *tree))[1]
    )
    with inference(MINE):
        order = MINE(torch.tensor(prompts))[:, -1].argsort(descending=True)  # (B, V)
        for prompt, likely in zip(prompts, order.tolist(), strict=True):
            # Nodes: the first, the third and the least likely token.
            labels = [[likely[0], 3], [likely[2], 3, 4], [likely[-1], 5], [likely[1]]]
            expected = plain_scores(MINE, prompt, labels)
            table, context, first = in_context([prompt], labels)
            for known in range(len(labels)):
                read.clear()
                score = expected[known : known + 1]
                choice = table.likeliest(context, first, torch.tensor([known]), score)
                assert choice == [int(expected.argmax())]
                rivals = [i for i in range(len(labels)) if i != known and first[0, i] >= score]
                nodes = 0
                if rivals:
                    best = max(rivals, key=lambda i: first[0, i])
                    bound = max(score, expected[best])
                    nodes = len(labels[best]) - 1
                    for i in rivals:
                        if i != best and first[0, i] >= bound:
                            nodes += len(labels[i]) - 1
                assert sum(tree.numel() for tree in read) == nodes


def test_choices_do_not_depend_on_the_rows_of_a_pass(monkeypatch):
    """The tree computes logits for a few rows at a time, which bounds its memory."""
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 4)]
    labels = [[1, 2, 3], [1, 4, 5], [2, 6]]
    known = torch.tensor([0, 1, 2])
    score = torch.tensor([-99.0, -99.0, -99.0])
    with inference(MINE):
        table, context, first = in_context(prompts, labels)
        whole = table.scores(context, first, torch.ones(3, 3, dtype=torch.bool))
        monkeypatch.setattr(context_module, "LOGITS", 1)
        parts = table.scores(context, first, torch.ones(3, 3, dtype=torch.bool))
        monkeypatch.setattr(label_module, "batches_by_tokens", lambda sizes, most: [[0], [2], [1]])
        choices = table.likeliest(context, first, known, score)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=0)
    whole[torch.arange(3), known] = score
    assert choices == whole.argmax(-1).tolist()


# ---- errors


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"labels": ["hello", "he", "as", "a"]},
            "row 1: its answer 'hello world.*' is not one of the labels",
        ),
        ({"labels": ["hello"]}, "at least two"),
        ({"labels": [*LABELS, "he"]}, "no two of them the same"),
        ({"metrics": {"loss": exact_match}}, r"\['loss'\] are measured already"),
        ({"metrics": {"x": exact_match}, "max_new_tokens": 0}, ">= 1 with metrics"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"max_new_tokens": -1}, "max_new_tokens >= 0"),
        ({"max_new_tokens": 250}, "exceed the model's context of 256"),
    ],
)
def test_bad_options_of_evaluate_raise(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(MINE, TOKENIZER, ROWS, **options)


def test_bad_rows_of_evaluate_raise():
    with pytest.raises(ValueError, match="empty"):
        evaluate(MINE, TOKENIZER, [])
    with pytest.raises(ValueError, match="row 1"):
        evaluate(MINE, TOKENIZER, [ROWS[0], {"question": "x"}])
    with pytest.raises(ValueError, match=r"rows \[1\] .* exceed the context of 256 tokens"):
        evaluate(MINE, TOKENIZER, [ROWS[0], {"messages": chat("x" * 100, "y" * 200)}])
    with pytest.raises(ValueError, match="plain texts"):
        evaluate(MINE, TOKENIZER, [{"text": "hello"}], labels=LABELS)


# ---- the real model


@pytest.mark.slow
def test_smollm2_chooses_by_likelihood(smollm2):
    """The labels are cities of one and of several tokens."""
    from minilora.data import load_tokenizer
    from minilora.models.loader import load_model

    model, tokenizer = load_model(smollm2, dtype="float32"), load_tokenizer(smollm2)
    capitals = {
        "France": "Paris",
        "Italy": "Rome",
        "Austria": "Vienna",
        "Iceland": "Reykjavik",
        "Cuba": "Havana",
    }
    rows = [{"messages": chat(f"The capital of {k}? One word.", v)} for k, v in capitals.items()]
    labels = list(capitals.values())
    scores = evaluate(model, tokenizer, rows, labels=labels, max_new_tokens=8, batch_size=2)
    prompts = [encode_prompt(split_prompt(row)[0], tokenizer) for row in rows]
    table = label_table(labels, tokenizer, split_prompt(rows[0])[0], len(prompts[0]))
    assert scores.choices == [
        labels[plain_scores(model, prompt, table).argmax()] for prompt in prompts
    ]
    assert scores.label_accuracy is not None and scores.label_accuracy >= 0.6
