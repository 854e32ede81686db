"""Tests of the engine: an answer does not depend on other requests in the batch.

Oracle: `ml.generate` with the request's adapter, prompt, seed and stop strings; the top-k filter of
transformers. Property: a row joins at the next token and leaves when it is finished, the cache is
as wide as its longest row, the pieces together are the text, a cancelled or late request frees its
row, and adapters can be loaded and unloaded while requests run. Errors: refused requests, adapters
and settings.
"""

from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper

import minilora as ml
from helpers.kinds import shake
from helpers.served import MARGIN, NAMES, alone, asks, build, run, tokenizer
from minilora.generation.decoding_batch import joined
from minilora.generation.engine import Engine, Full
from minilora.generation.sequence import Ask, Row, Text
from minilora.models.padded_batch import Context, inference

WINDOWS = {"full": {}, "window": {"family": "mistral", "sliding_window": 7}}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def engine(model):
    made = Engine(model, tokenizer(), batch_size=5)
    yield made
    made.close()


# ---- oracle


@pytest.mark.parametrize("kind", WINDOWS)
def test_answers_equal_those_of_single_requests(kind):
    """New requests arrive while others run, five at a time, with mixed lengths and adapters."""
    model, wanted = build(**WINDOWS[kind]), asks(12)
    with_stops = [Ask(ask.prompt, ask.adapter, 12, stop=("e", "a b")) for ask in wanted[:4]]
    wanted += with_stops
    expected = {ask: alone(model, ask) for ask in wanted}
    assert len({*expected.values()}) > 10 and any(len(expected[ask]) for ask in with_stops)
    engine, pieces, later = Engine(model, tokenizer(), batch_size=5), [], list(wanted)
    while later:
        engine.submit([later.pop(0) for _ in range(min(2, len(later)))])
        pieces += engine.step()
    found = run(engine, pieces)
    engine.close()
    assert {ask: text for ask, (text, _) in found.items()} == expected
    for ask, (_, finish) in found.items():
        full = sum(piece.tokens for piece in pieces if piece.ask is ask) == ask.max_tokens
        assert finish == ("length" if full else "stop") or (full and ask.stop)


@pytest.mark.parametrize("kind", WINDOWS)
def test_joined_caches_give_the_logits_of_separate_caches(kind):
    """The tolerance is a fifth of the margin of an arg-max that the other tests require."""
    model = build(adapters=0, **WINDOWS[kind])
    rows = [
        [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]],
        [[16, 17, 18]],
        [[19] * 4, [20] * 11, [21]],
    ]
    with inference(model):
        contexts = [Context(model) for _ in rows]
        for context, prompts in zip(contexts, rows, strict=True):
            context.extend(prompts)
        chosen = [[0, 1], [0], [2, 0]]  # the longest row leaves, two rows change places
        whole = joined([*zip(contexts, chosen, strict=True)])
        assert whole is not None and whole.cache.length == whole.real.shape[1] == 9
        for _ in range(3):
            tokens = [[i + 30] for i in range(5)]
            found, start = whole.extend(tokens), 0
            for context, prompts, places in zip(contexts, rows, chosen, strict=True):
                some = [
                    tokens[start + places.index(i)] if i in places else [1]
                    for i in range(len(prompts))
                ]
                expected = context.extend(some)[places]
                assert (found[start : start + len(places)] - expected).abs().max() < MARGIN / 5
                start += len(places)
    assert joined([(contexts[0], [])]) is None


def test_top_k_equals_the_filter_of_transformers():
    logits = torch.randn(50)
    kept = set(
        torch.isfinite(TopKLogitsWarper(4)(torch.tensor([[0]]), logits[None]))[0]
        .nonzero()
        .flatten()
        .tolist()
    )
    row = Row(Ask([5], temperature=2.0, top_k=4, seed=0), tokenizer(), 0)
    assert {row.choose(logits) for _ in range(300)} == kept
    one, whole = (Row(Ask([5], temperature=2.0, top_k=k, seed=1), tokenizer(), 0) for k in (1, 50))
    free = Row(Ask([5], temperature=2.0, seed=1), tokenizer(), 0)
    assert {one.choose(logits) for _ in range(20)} == {int(logits.argmax())}
    assert [whole.choose(logits) for _ in range(50)] == [free.choose(logits) for _ in range(50)]


# ---- property


def test_a_request_joins_at_the_next_token_and_leaves_when_finished(engine):
    long, short = Ask([40] * 30, NAMES[0], 9), Ask([41] * 3, NAMES[1], 2)
    engine.submit([long])
    assert [piece.ask for piece in engine.step()] == [long]
    engine.submit([short])
    assert {piece.ask for piece in engine.step()} == {
        long,
        short,
    } and engine.context.real.shape == (2, 31)
    assert [piece.finish for piece in engine.step() if piece.ask is short] == ["length"]
    assert engine.context.real.shape == (1, 32)
    engine.submit([short])
    run(engine)
    assert engine.context is None and not engine.rows


def test_the_cache_is_as_wide_as_its_longest_row(engine):
    """Otherwise a server that is never idle would run out of memory."""
    engine.submit([Ask([40] * 50, None, 2)])
    widths = []
    for number in range(40):
        engine.submit([Ask([41] * (3 + number % 2), None, 4)])
        engine.step()
        longest = max(len(row.ask.prompt) + len(row.text.ids) - 1 for row in engine.rows)
        widths.append(engine.context.cache.length)
        assert widths[-1] == longest
    assert widths[0] == 50 and max(widths[3:]) < 9
    run(engine)


def test_one_step_reads_a_limited_number_of_prompt_tokens(engine):
    """Running requests wait for at most one long prompt, or READ tokens of short prompts."""
    engine.submit([Ask([40] * 300, None, 1), *(Ask([41] * 200, None, 1) for _ in range(3))])
    assert [len(engine.step()) for _ in range(3)] == [1, 2, 1]


@pytest.mark.parametrize(
    "stops", [(), ("é🙂",), ("hello w", "<|im_end|>"), ("lo", "hello there"), ("<|im_end|>",)]
)
def test_pieces_together_are_the_text_and_are_final(stops):
    """Incomplete characters and a possible beginning of a stop string are held back."""
    text = tokenizer()
    said = "naïve 🙂 hello wo é🙃é🙂 hello world <|im_end|> and on"
    ids = text.encode(said, add_special_tokens=False)
    grown, pieces = Text(text, stops), []
    for token in ids:
        piece, stopped = grown.push(token)
        pieces.append(piece)
        if stopped:
            break
    pieces.append(grown.rest())
    expected = text.decode(grown.ids, skip_special_tokens=True)
    for word in stops:
        expected = expected.partition(word)[0]
    assert "".join(pieces) == expected and not any("\ufffd" in piece for piece in pieces)
    assert text.decode(grown.ids).endswith(stops) if stops else grown.ids == ids
    assert sum(map(bool, pieces)) > 5


def test_a_cancelled_request_frees_its_row(engine):
    first, second = Ask([40] * 3, None, 200), Ask([41] * 4, NAMES[2], 3)
    engine.submit([first, *(Ask([42], None, 1) for _ in range(4)), second])
    engine.step()
    engine.cancel(first)
    engine.cancel(first)
    found = run(engine)
    assert first not in found and found[second][1] == "length"
    engine.submit([waits := Ask([40], None, 5)])
    engine.cancel(waits)
    assert run(engine) == {} and not engine.busy


def test_a_late_request_ends_with_the_text_so_far(model):
    now = [0.0]
    engine = Engine(model, tokenizer(), batch_size=1, clock=lambda: now[0])
    slow, waits, quick = (
        Ask([40] * 3, None, 50, seconds=5),
        Ask([41], None, 50, seconds=5),
        Ask([42], None, 2),
    )
    engine.submit([slow, waits, quick])
    pieces = [*engine.step(), *engine.step()]
    now[0] = 6.0
    found = run(engine, pieces)
    engine.close()
    assert {ask: finish for ask, (_, finish) in found.items()} == {
        slow: "timeout",
        waits: "timeout",
        quick: "length",
    }
    assert found[slow][0] == alone(model, Ask(slow.prompt, None, 2)) and found[waits][0] == ""


def test_adapters_are_loaded_and_unloaded_between_two_tokens(tmp_path):
    model = build(adapters=3)
    ml.save_adapter(model, tmp_path / "two", name=NAMES[2])
    base, kept = Ask([40, 50, 60], None, 12), Ask([41, 51], NAMES[1], 12)
    new = Ask([42, 52], "new", 12)
    expected = [alone(model, ask) for ask in (base, kept, Ask(new.prompt, NAMES[2], 12))]
    ml.delete_adapter(model, NAMES[2])
    engine = Engine(model, tokenizer())
    engine.submit([base, kept])
    pieces = [*engine.step(), *engine.step()]
    engine.load("new", tmp_path / "two")
    engine.submit([new])
    pieces += engine.step()
    engine.unload("new")
    engine.unload(NAMES[1])
    assert engine.adapters == [NAMES[0]] and ml.list_adapters(model) == [*NAMES[:2], "new"]
    with pytest.raises(
        ValueError, match="adapter: expected one of .'adapter0'. or None, got 'new'"
    ):
        engine.submit([Ask([1], "new")])
    with pytest.raises(ValueError, match="'new' is still answering: unload it first, and wait"):
        engine.load("new", tmp_path / "two")
    found = run(engine, pieces)
    assert [found[ask][0] for ask in (base, kept, new)] == expected
    assert ml.list_adapters(model) == [NAMES[0]]
    engine.unload(NAMES[0])
    assert not ml.list_adapters(model)
    engine.load("new", tmp_path / "two")
    engine.submit([again := Ask(new.prompt, "new", 12)])
    assert run(engine)[again][0] == expected[2]
    engine.close()
    assert not any("forward" in vars(module) for module in model.modules())


KINDS = {
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


def with_kinds(kinds) -> Any:
    """Return a model with one linear adapter, and one of each of the kinds."""
    model = build(adapters=1, attention_bias=True, tie_word_embeddings=False)
    for number, kind in enumerate(kinds):
        ml.inject(model, ml.LoRAConfig(r=2, lora_alpha=8, **KINDS[kind]), name=kind, seed=number)
        ml.set_adapter(model, kind)
        shake(model, 20 + number)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                with torch.no_grad():  # the whole modules and biases
                    parameter.add_(0.3 * torch.randn_like(parameter))
    ml.set_adapter(model, [])
    return model


def test_adapters_of_other_kinds_are_answered_one_at_a_time(tmp_path):
    model = with_kinds(KINDS)
    names = ["dora", None, "whole", "whole", NAMES[0], "embedding", "biases", "dora", None]
    wanted = []
    for number, name in enumerate(names):
        wanted.append(Ask([70 + number, 50, 60], name, 8))
    expected = {ask: alone(model, Ask(ask.prompt, ask.adapter, 8)) for ask in wanted}
    texts = {expected[ask] for ask in wanted}
    assert len(texts) == len(wanted)
    ml.save_adapter(model, tmp_path / "dora", name="dora")
    engine = Engine(model, tokenizer(), batch_size=5)
    assert set(engine.exclusive) == set(KINDS)
    engine.submit(wanted)
    pieces = []
    while engine.busy:
        pieces += engine.step()
        together = {row.ask.adapter for row in engine.rows}
        assert len(together) == 1 or together <= {None, NAMES[0]}
    found = run(engine, pieces)
    assert {ask: text for ask, (text, _) in found.items()} == expected
    # An adapter leaves while it answers, and its name is free afterwards.
    engine.submit([last := Ask(wanted[0].prompt, "dora", 8)])
    pieces = engine.step()
    engine.unload("dora")
    assert run(engine, pieces)[last][0] == expected[wanted[0]]
    assert "dora" not in ml.list_adapters(model)
    engine.load("again", tmp_path / "dora")
    assert "again" in engine.exclusive
    engine.submit([again := Ask(wanted[0].prompt, "again", 8)])
    engine.submit([base := Ask(wanted[1].prompt, None, 8)])
    found = run(engine)
    assert found[again][0] == expected[wanted[0]] and found[base][0] == expected[wanted[1]]
    engine.close()


# ---- error


def test_a_submission_larger_than_the_queue_is_refused_as_a_whole(engine):
    engine.submit([Ask([1], None, 1) for _ in range(engine.most - 1)])
    with pytest.raises(Full, match="0 requests are being answered and 68 wait"):
        engine.submit([Ask([1]), Ask([1])])
    engine.submit([Ask([1], None, 1)])
    assert len(engine.waiting) == engine.most
    run(engine)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": [1], "adapter": "nobody"}, "got 'nobody'"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": [100000]}, "each from 0 to"),
        ({"prompt": [-1]}, "each from 0 to"),
        (
            {"prompt": [1] * 500, "max_tokens": 13},
            "500 tokens, which with 13 new ones exceed the 512",
        ),
        ({"prompt": [1], "max_tokens": -1}, "max_tokens must be 0 or more"),
        ({"prompt": [1], "temperature": float("nan")}, "temperature must be"),
        ({"prompt": [1], "top_p": 0.0}, "top_p must be"),
        ({"prompt": [1], "top_k": -1}, "top_k must be 0"),
        ({"prompt": [1], "min_p": 1.5}, "min_p must be 0 to 1, got 1.5"),
        ({"prompt": [1], "logit_bias": {100000: 1.0}}, "logit_bias: expected token ids from 0 to"),
        ({"prompt": [1], "stop": ("",)}, "no empty stop"),
    ],
)
def test_bad_requests_are_refused(engine, given, message):
    with pytest.raises(ValueError, match=message):
        engine.submit([Ask(**given)])
    assert not engine.busy


def test_an_adapter_that_cannot_be_loaded_changes_nothing(tmp_path):
    model = build(adapters=1)
    engine = Engine(model, tokenizer())
    ask = Ask([40, 41], NAMES[0], 5)
    engine.submit([ask])
    expected = run(engine)[ask]
    for name, folder, message in [
        ("gone", "gone", "no such folder"),
        (NAMES[0], "whole", "already loaded"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            engine.load(name, tmp_path / folder)
    with pytest.raises(ValueError, match="got 'gone'"):
        engine.unload("gone")
    engine.submit([again := Ask(ask.prompt, ask.adapter, 5)])
    assert run(engine)[again] == expected and engine.adapters == [NAMES[0]]


def test_engine_refuses_other_models_and_sizes(model):
    with pytest.raises(ValueError, match="expected a model of ml.load_model, got Linear"):
        Engine(torch.nn.Linear(2, 2), tokenizer())
    with pytest.raises(ValueError, match="expected 2 to the model's context of 512, got 513"):
        Engine(model, tokenizer(), max_length=513)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        Engine(model, tokenizer(), batch_size=0)
