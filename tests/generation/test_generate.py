"""Tests of `generate`: batching, padding, the cache, sampling, stops and errors.

Oracle: `generate` of transformers (greedy, with padding), and its top-p filter. Property: the
answers of a batch equal those of single prompts, and those with a cache equal a loop without a
cache. Sampling draws exactly the tokens of the nucleus with their probabilities, and a sampled row
does not depend on other rows. Then end tokens and stop strings, and errors.

Token-for-token equality in fp32 needs an arg-max that rounding cannot change. `gap` checks this for
the models here.
"""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, TopPLogitsWarper

from helpers.chats import chat, ours, theirs
from helpers.prompts import EOS, VOCABULARY, pair, ragged
from minilora.data import RawText, Tokenizer, encode_prompt
from minilora.generation.generate import end_tokens, generate, generate_ids
from minilora.generation.sampling import Decoding, pick
from minilora.generation.single_token import matrix_vector
from minilora.models.padded_batch import Context


def plain_greedy(model, prompt: list[int], count: int, ends=frozenset()) -> list[int]:
    """Decode greedily by the definition: read the whole sequence again for each new token.

    Also assert that rounding cannot change an arg-max.
    """
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            top = model(torch.tensor([ids]))[0, -1].topk(2)
        gap = (top.values[0] - top.values[1]).item()
        assert gap > 1e-4, "two tokens are equal but for rounding: choose other weights"
        if top.indices[0].item() in ends:
            break
        ids.append(top.indices[0].item())
    return ids[len(prompt) :]


PROMPTS = [ragged(5, 1, 17, 9, 30, 2, 9), ragged(5, 1, 17, 9, common=6), ragged(4)]


# ---- oracle


@pytest.mark.parametrize("prompts", PROMPTS, ids=["ragged", "common beginning", "one"])
def test_greedy_equals_transformers(prompts):
    model, mine = pair()
    rule = Decoding(20, batch_size=3, ends=frozenset({EOS}))
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    expected = [row[width:].tolist() for row in out]
    expected = [row[: row.index(EOS)] if EOS in row else row for row in expected]
    assert generate_ids(mine, prompts, rule) == expected
    assert generate_ids(model, prompts, rule) == expected  # transformers' model through our loop


def test_gpt2_of_transformers_gives_its_own_answers():
    """GPT-2 has absolute positions, so a wrong position id changes the answer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    prompts = ragged(7, 2, 12, common=3)
    out = [
        model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        for p in prompts
    ]
    expected = [row[0, len(p) :].tolist() for row, p in zip(out, prompts, strict=True)]
    assert generate_ids(model, prompts, Decoding(12, batch_size=2)) == expected


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 6}], ids=["no window", "window"])
@pytest.mark.parametrize("common", [0, 5])
def test_cached_and_batched_decoding_equals_the_definition(fields, common):
    _, mine = pair("mistral", **({"sliding_window": None} | fields))
    prompts = ragged(3, 12, 1, 7, 7, common=common)
    # One token in eleven ends an answer, so rows end at different times.
    ends = frozenset(range(0, VOCABULARY, 11))
    expected = [plain_greedy(mine, prompt, 15, ends) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2
    for batch_size in (1, 2, 5):
        assert (
            generate_ids(mine, prompts, Decoding(15, batch_size=batch_size, ends=ends)) == expected
        )


# ---- sampling


def plain_nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> set[int]:
    """Return the nucleus: take the likeliest tokens until their sum reaches top_p."""
    p = (logits.double() / temperature).softmax(-1)
    chosen, total = set(), 0.0
    for token in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        chosen.add(token)
        total += p[token].item()
    return chosen


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.3, 3.0),
    top_p=st.floats(0.05, 1.0),
)
def test_pick_draws_exactly_the_tokens_of_the_nucleus(values, temperature, top_p):
    """Equally spaced numbers u draw each token of the nucleus by its probability, and no other."""
    logits, steps = torch.tensor(values), 4000
    sweep = [(i + 0.5) / steps for i in range(steps)]
    drawn = pick(logits.expand(steps, -1), temperature, top_p, sweep)
    nucleus = plain_nucleus(logits, temperature, top_p)
    p = (logits.double() / temperature).softmax(-1)
    share = np.bincount(drawn, minlength=len(values)) / steps
    mass = sum(p[token].item() for token in nucleus)
    for token in range(len(values)):
        expected = p[token].item() / mass if token in nucleus else 0.0
        # A grid with spacing 1 / steps measures an interval to within one step.
        assert abs(share[token] - expected) <= 1.001 / steps


def test_a_nucleus_that_reaches_top_p_exactly_takes_no_further_token():
    assert pick(torch.zeros(3, 4), 1.0, 0.5, [0.0, 0.5, 0.999]) == [0, 1, 1]  # 1/4 + 1/4 is top_p


def test_the_nucleus_equals_that_of_transformers():
    logits = 3 * torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for top_p in (0.1, 0.5, 0.9, 0.99):
        warper = TopPLogitsWarper(top_p)
        kept = warper(None, logits / 0.7) > -torch.inf  # pyright: ignore[reportArgumentType] no ids
        for row in range(20):
            assert set(kept[row].nonzero().flatten().tolist()) == plain_nucleus(
                logits[row], 0.7, top_p
            )


def test_sampled_tokens_have_the_frequencies_of_softmax():
    """Compare the first tokens of 4,000 rows with softmax(logits / T).

    Chi-squared must be below about its 99.9 % quantile.
    """
    _, mine = pair()
    prompt = ragged(6)[0]
    with torch.no_grad():
        p = (mine(torch.tensor([prompt]))[0, -1].double() / 0.8).softmax(-1).numpy()
    rule = Decoding(1, temperature=0.8, seed=3, batch_size=1000)
    drawn = [answer[0] for answer in generate_ids(mine, [prompt] * 4000, rule)]
    expected = 4000 * p
    common = expected >= 5  # all rare tokens share one cell
    observed = np.bincount(drawn, minlength=VOCABULARY)
    cells = [
        (observed[common], expected[common]),
        (observed[~common].sum(), expected[~common].sum()),
    ]
    chi2, freedom = sum(((o - e) ** 2 / e).sum() for o, e in cells), common.sum()
    assert freedom > 5 and chi2 < freedom + 3.1 * (2 * freedom) ** 0.5


def test_a_sampled_row_does_not_depend_on_other_rows():
    _, mine = pair()
    prompts = ragged(5, 1, 17, 9, 30, 2)

    def sample(prompts, batch_size=16, seed: int | None = 7):
        return generate_ids(mine, prompts, Decoding(12, 1.0, 0.9, seed, batch_size))

    every = sample(prompts)
    assert every == sample(prompts, batch_size=1) == sample(prompts, batch_size=4)
    assert sample(prompts[:2]) == every[:2]
    assert sample([prompts[0], *ragged(3, 8, common=11)])[0] == every[0]
    assert every != sample(prompts, seed=8)
    assert sample(prompts, seed=None) != sample(prompts, seed=None)
    same = sample([prompts[0]] * 6)
    assert len({tuple(answer) for answer in same}) == 6  # rows draw independently
    cold = generate_ids(mine, prompts, Decoding(12, temperature=1e-300, seed=0))
    assert cold == generate_ids(mine, prompts, Decoding(12))


@pytest.mark.parametrize("way", ["compiled", "amx"])
def test_one_token_takes_a_vector_product_through_dense_layers(monkeypatch, way):
    """The fp32 sum of 576 products is rounded once to bf16, by at most 2^-8 of it."""
    if way == "compiled" and shutil.which("cc") is None:
        pytest.skip("no C compiler (cc): torch multiplies")
    if way == "amx":
        monkeypatch.setenv("MINILORA_STEPS", "torch")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with matrix_vector(plain := torch.nn.Linear(8, 8, dtype=torch.bfloat16)):
            assert "forward" not in vars(plain)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for bias in (True, False):
        layer = torch.nn.Linear(576, 96, bias=bias, dtype=torch.bfloat16)
        x = torch.randn(1, 1, 576).bfloat16()
        with torch.no_grad():
            before = layer(x), layer(x.expand(1, 2, -1))
            with matrix_vector(layer):
                assert "forward" in vars(layer)
                inside = layer(x), layer(x.expand(1, 2, -1))
                assert torch.equal(inside[1], before[1])  # two tokens take the matrix product
                with matrix_vector(layer):  # a layer whose forward is replaced keeps it
                    assert torch.equal(layer(x), inside[0])
            exact = layer.double()(x.double())
            size = torch.nn.functional.linear(
                x.double().abs(),
                layer.weight.abs(),
                layer.bias if layer.bias is None else layer.bias.abs(),
            )
        assert "forward" not in vars(layer) and inside[0].shape == exact.shape
        assert (
            (inside[0].double() - exact).abs() <= 2**-8 * exact.abs() + 576 * 2**-24 * size
        ).all()


# ---- text in, text out, and the end of an answer


@pytest.mark.parametrize(
    "tokenizer", [ours("chatml"), theirs("chatml")], ids=["minilora", "transformers"]
)
def test_one_prompt_gives_a_text_and_a_list_gives_a_list(tokenizer):
    _, mine = pair()
    ids = generate_ids(
        mine, [encode_prompt("hello", tokenizer)], Decoding(8, ends=end_tokens(mine, tokenizer))
    )[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert generate(mine, tokenizer, "hello", max_new_tokens=8) == text
    assert generate(mine, tokenizer, chat("hello"), max_new_tokens=8) == text
    many = generate(
        mine, tokenizer, ["hello", chat("a", "b", "c"), RawText("hello")], max_new_tokens=8
    )
    assert isinstance(many, list) and len(many) == 3
    assert many[0] == text and len(set(many)) == 3
    assert generate(mine, tokenizer, []) == []


def test_end_tokens_come_from_config_tokenizer_and_template():
    theirs_model, mine = pair()
    tokenizer = ours("llama3")
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end_tokens(mine, tokenizer) == {EOS, eot}
    theirs_model.generation_config.eos_token_id = [7, 8]
    assert end_tokens(theirs_model, tokenizer) == {EOS, 7, 8, eot}
    names = {"eos_token": "<|end_header_id|>", "bos_token": "<|begin_of_text|>"}
    other = Tokenizer(tokenizer.backend, names, tokenizer.chat_template)
    # the template's end-of-turn token is not the tokenizer's EOS
    assert end_tokens(mine, other) == {EOS, other.eos_token_id, eot}
    other.chat_template = None
    assert end_tokens(mine, other) == {EOS, other.eos_token_id}


def test_stop_strings_and_stop_tokens_cut_the_answer():
    _, mine = pair()
    tokenizer = ours("chatml")
    prompts = [RawText("hello"), RawText("as")]
    full = generate(mine, tokenizer, prompts, max_new_tokens=20)
    ids = [generate_ids(mine, [encode_prompt(p, tokenizer)], Decoding(20))[0] for p in prompts]
    word = next(
        full[0][i : i + 2]
        for i in range(4, 20)
        if full[0][i : i + 2].isascii() and full[0][i].isalpha()
    )
    assert generate(mine, tokenizer, prompts, stop=word, max_new_tokens=20) == [
        text.partition(word)[0] for text in full
    ]
    last = ids[0][-1]
    cut = generate(mine, tokenizer, prompts, stop=[last, "never said"], max_new_tokens=20)
    assert cut[0] == tokenizer.decode(ids[0][: ids[0].index(last)], skip_special_tokens=True)


def test_no_token_is_generated_after_a_stop_string(monkeypatch):
    """The text after a stop string is not generated at all."""
    _, mine = pair()
    tokenizer = ours("chatml")
    text = generate(mine, tokenizer, RawText("hello"), max_new_tokens=40)
    forwards = []
    extend = Context.extend

    def spy(self, rows, **options):
        forwards.append(len(rows))
        return extend(self, rows, **options)

    monkeypatch.setattr(Context, "extend", spy)
    word = next(
        character for character in text[1:] if character.isprintable() and character != "\ufffd"
    )
    generate(mine, tokenizer, RawText("hello"), max_new_tokens=40, stop=word)
    assert len(forwards) < 30


# ---- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"stop": ["x", ""]}, "empty string"),
        (
            {"max_new_tokens": 250},
            r"prompt 0 has \d+ tokens, which with 250 new ones exceed .* context of 256",
        ),
    ],
)
def test_bad_options_of_generate_raise(options, message):
    with pytest.raises(ValueError, match=message):
        generate(pair()[1], ours("chatml"), "hello", **options)


def test_bad_prompts_raise():
    _, mine = pair()
    for prompt in ("", RawText(""), ["hello", ""], [[]]):
        with pytest.raises(ValueError, match="empty"):
            generate(mine, ours("chatml"), prompt)
    for prompt in (
        chat("hello")[0],
        ["hello", chat("hello")[0]],
        ["hello", ["hello"]],
        ["hello", 5],
    ):
        with pytest.raises(
            ValueError, match=r"prompt [01]: expected a text or a list of messages .dicts., got"
        ):
            generate(mine, ours("chatml"), prompt)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_ids(mine, [[1], []], Decoding(1))
    with pytest.raises(ValueError, match="prompt 1 has 300 tokens"):
        generate_ids(mine, [[1], [1] * 300], Decoding(1))


# ---- the real model


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    from minilora.data import load_tokenizer
    from minilora.models.loader import load_model

    model, tokenizer = load_model(smollm2, dtype="float32"), load_tokenizer(smollm2)
    questions = ["What is the capital of France?", "What is the capital of Germany? One word."]
    answers = generate(model, tokenizer, questions, max_new_tokens=24)
    assert "Paris" in answers[0]
    assert answers == [
        generate(model, tokenizer, question, max_new_tokens=24) for question in questions
    ]
    assert len(answers[0]) < 80  # an end token ended the answer
