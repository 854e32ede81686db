"""Tests of the decoder, its cache and its documents against transformers.

Oracle: logits and parameter gradients of transformers' models of every family with the same random
weights, for every option of a config. Property: a cache in any number of steps, padding, packing
and recomputing change nothing. Errors: misuse of the cache. bounds.py computes the largest
difference that fp32 allows between two correct results.
"""

import pytest
import torch
from torch import Tensor

from helpers.bounds import assert_rounded, attention_sizes, rounding
from helpers.tiny import GEMMA, KINDS, LLAMA3, SIZES, oracle, tokens, twin
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.kv_cache import KVCache
from minilora_kernels.ops.attention import attention, causal_mask, plain_attention

REORDERED = 5e-5  # with other shapes, other kernels sum in another order
VARIED = {
    name: KINDS[name]
    for name in (
        "llama3",
        "window 5",
        "qwen2",
        "qwen2 window above",
        "qwen3 window between",
        "smollm3 window, untied, biases",
        "gemma3",
    )
}
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# ---- oracle: transformers


@kinds
def test_logits_equal_transformers(fields):
    reference = oracle(**fields)
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, ours = reference(ids).logits, twin(reference)
        assert_rounded(ours(ids), expected, rounding(ours, lambda model: model(ids)))
        assert expected.std() > 0.5  # the logits are not all near zero


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_of_transformers_attentions(implementation):
    reference = oracle()
    reference.set_attn_implementation(implementation)
    ids, ours = tokens(2, 33), twin(reference)
    with torch.no_grad():
        assert_rounded(ours(ids), reference(ids).logits, rounding(ours, lambda model: model(ids)))


@kinds
def test_gradients_equal_transformers(fields):
    reference = oracle(**fields)
    ours = twin(reference)
    ids = tokens(2, 24)
    for logits in (reference(ids).logits, ours(ids)):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
    expected = dict(reference.named_parameters())
    # With window 1, no attention weight depends on q.
    nothing = 1e-6 * max(p.grad.norm() for p in expected.values())
    for name, parameter in ours.named_parameters():
        wanted = expected[name].grad
        assert wanted.abs().max() > 0, name
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + nothing, name


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": LLAMA3, "attention_bias": True},
        KINDS["qwen2"],
        KINDS["qwen3"],
        KINDS["smollm3"],
        GEMMA,
    ],
    ids=["llama", "qwen2", "qwen3", "smollm3", "gemma3"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rounds_where_transformers_rounds(fields, dtype):
    """The operations have the same order: at most one ulp apart at size 10 (measured: none)."""
    reference = oracle(**fields)
    rope = reference.model.rotary_emb
    frequencies = {name: buffer.clone() for name, buffer in rope.named_buffers()}
    reference.to(dtype)
    for name, buffer in frequencies.items():
        setattr(rope, name, buffer)  # from_pretrained leaves them in fp32; `.to` does not
    with torch.no_grad():
        expected = reference(tokens(2, 40)).logits
        assert (
            distance(twin(reference).to(dtype)(tokens(2, 40)), expected)
            <= 10 * torch.finfo(dtype).eps
        )


def test_gemmas_embedding_is_scaled_by_a_rounded_root():
    reference, seen = oracle(**GEMMA).bfloat16(), []
    ours = twin(reference).bfloat16()
    ours.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ours(tokens(2, 40))
    assert torch.equal(seen[0], reference.model.embed_tokens(tokens(2, 40)))


@pytest.mark.parametrize("fields", VARIED.values(), ids=VARIED.keys())
def test_padding_on_the_left_equals_transformers_attention_mask(fields):
    reference = oracle(**fields)
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        ours = twin(reference)
        actual = ours(ids, position_ids=positions, document_ids=mask - 1)
    assert torch.isfinite(actual).all()  # padding sees padding, so that every row has a key
    text = mask.bool()
    bound = rounding(
        ours, lambda model: model(ids, position_ids=positions, document_ids=mask - 1)[text]
    )
    assert_rounded(actual[text], expected[text], bound)


def test_the_scale_of_attention_is_the_same_in_both_forms():
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    expected = plain_attention(q * 2, k, v)  # 2q with scale 1/√d has the scores of q with 2/√d
    for form in (plain_attention, attention):
        difference = (form(q, k, v, scale=2 / 16**0.5) - expected).abs()
        assert (
            difference <= torch.finfo(torch.float32).eps * attention_sizes(q * 2, k, v, v)[0]
        ).all()


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    """Logits agree within 2e-5 of their size (30 layers of fp32 rounding), with equal arg-max."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import minilora as ml

    path = Path(smollm2)
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (smollm2, {})
    reference = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    model = ml.load_model(smollm2, dtype="float32")
    tokenizer = ml.load_tokenizer(smollm2)
    text = "The capital of France is Paris, and the largest city of Switzerland is Zürich. def f(x): return x + 1\n"
    ids = torch.tensor([tokenizer.encode(text * 4)])
    with torch.no_grad():
        expected, actual = reference(ids).logits, model(ids)
    assert distance(actual, expected) <= 2e-5 * expected.abs().max()
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


# ---- property: cache, documents, checkpointing


@pytest.mark.parametrize("fields", VARIED.values(), ids=VARIED.keys())
@pytest.mark.parametrize(
    "steps", [[1] * 20, [12, 1, 1, 6], [20]], ids=["one by one", "chunks", "whole"]
)
def test_cached_equals_uncached(fields, steps):
    model = twin(oracle(**fields))
    ids = tokens(2, sum(steps))
    cache = KVCache()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(steps, dim=1)]
        assert cache.length == sum(steps)
        assert distance(torch.cat(parts, dim=1), model(ids)) <= REORDERED


@pytest.mark.parametrize("fields", VARIED.values(), ids=VARIED.keys())
def test_padded_and_cached_equals_alone(fields):
    """Two left-padded prompts of different lengths, continued step by step, equal each alone."""
    model = twin(oracle(**fields))
    ids = tokens(2, 15)
    document_ids = torch.zeros_like(ids)
    document_ids[0, :4] = -1
    cache = KVCache()
    with torch.no_grad():
        model(ids[:, :10], document_ids=document_ids[:, :10], cache=cache)
        for step in range(10, 15):  # without document_ids, the last document continues
            logits = model(ids[:, step : step + 1], cache=cache)
        assert distance(logits[0, -1], model(ids[:1, 4:])[0, -1]) <= REORDERED
        assert distance(logits[1, -1], model(ids[1:])[0, -1]) <= REORDERED


def test_documents_may_start_after_a_plain_prefix():
    model = twin(oracle())
    ids = tokens(1, 12)
    cache = KVCache()
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        logits = model(ids[:, 6:], document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]), cache=cache)
        assert distance(logits[:, :3], model(ids)[:, 6:9]) <= REORDERED  # document 0 continues
        assert distance(logits[:, 3:], model(ids[:, 9:])) <= REORDERED


def test_packed_documents_do_not_see_each_other():
    model = twin(oracle(rope_parameters=LLAMA3))
    parts = [tokens(1, count, seed=count) for count in (3, 8, 1, 5)]
    document_ids = torch.cat([torch.full_like(part, n) for n, part in enumerate(parts)], dim=1)
    with torch.no_grad():
        packed = model(torch.cat(parts, dim=1), document_ids=document_ids)
        alone = torch.cat([model(part) for part in parts], dim=1)
    assert distance(packed, alone) <= REORDERED


def test_truncate_forgets_documents_too_and_buffers_grow_by_doubling():
    model = twin(oracle())
    ids, cache, places = tokens(2, 70), KVCache(), set()
    document_ids = torch.where(torch.arange(70) < torch.tensor([[3], [0]]), -1, 0)
    with torch.no_grad():
        for step in range(70):
            model(
                ids[:, step : step + 1], document_ids=document_ids[:, step : step + 1], cache=cache
            )
            places.add(cache.keys[0].data_ptr())
        cache.truncate(30)
        logits = model(ids[:, 30:40], cache=cache)
        assert (
            distance(logits, model(ids[:, :40], document_ids=document_ids[:, :40])[:, 30:])
            <= REORDERED
        )
    assert len(places) <= 8  # 1, 2, 4, 8, 16, 32, 64, 128


def test_an_explicit_mask_may_be_a_tree():
    """Two endings of one prompt in one row equal each ending in a separate row.

    They have the same positions and do not see each other.
    """
    model = twin(oracle())
    prompt, one, two = tokens(1, 6), tokens(1, 3, seed=1), tokens(1, 3, seed=2)
    mask = causal_mask(12, 12).clone()
    mask[..., 9:, 6:9] = False
    positions = torch.tensor([[*range(9), *range(6, 9)]])
    with torch.no_grad():
        tree = model.lm_head(
            model.hidden(torch.cat([prompt, one, two], dim=1), positions, mask=mask)
        )
        assert distance(tree[:, :9], model(torch.cat([prompt, one], dim=1))) <= REORDERED
        assert distance(tree[:, 9:], model(torch.cat([prompt, two], dim=1))[:, 6:]) <= REORDERED


def test_layers_with_different_windows_need_one_mask_per_kind():
    model = twin(oracle(**KINDS["qwen2 window above"]))
    masks = {
        "full_attention": causal_mask(12, 12),
        "sliding_attention": causal_mask(12, 12, window=5),
    }
    with torch.no_grad():
        given = model.lm_head(model.hidden(tokens(2, 12), mask=masks))
        assert distance(given, model(tokens(2, 12))) <= REORDERED
        with pytest.raises(
            ValueError, match="a mask for each kind of layer, full_attention and sliding_attention"
        ):
            model.hidden(tokens(2, 12), mask=masks["full_attention"])


def test_select_and_truncate_share_a_prompt():
    model = twin(oracle())
    prompt, endings = tokens(1, 7), tokens(3, 4, seed=1)
    cache = KVCache()
    with torch.no_grad():
        model(prompt, cache=cache)
        copies = cache.select(torch.tensor([0, 0, 0]))
        logits = model(endings, cache=copies)
        whole = model(torch.cat([prompt.expand(3, -1), endings], dim=1))[:, 7:]
        assert distance(logits, whole) <= REORDERED
        assert (cache.length, copies.length) == (7, 11)
        copies.truncate(7)
        assert distance(model(endings.flip(0), cache=copies), whole.flip(0)) <= REORDERED


def test_checkpointing_recomputes_and_changes_nothing():
    """Each layer's MLP runs twice with checkpointing and once without; the embedding is frozen."""
    results = []
    for recompute in (False, True):
        model = twin(oracle()).train()
        model.get_input_embeddings().requires_grad_(False)
        model.gradient_checkpointing = recompute
        calls = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(tokens(2, 9)).square().mean().backward()
        assert len(calls) == (2 if recompute else 1) * len(model.model.layers)
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_names_and_ties():
    model = CausalLM(DecoderConfig(**SIZES, tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    hidden = model.hidden(tokens(2, 5))
    assert hidden.shape == (2, 5, 64)
    assert torch.equal(model.lm_head(hidden), model(tokens(2, 5)))
    assert list(oracle(tie_word_embeddings=True).state_dict()) == list(model.state_dict())


def test_halving_the_model_leaves_rope_in_fp32():
    """bf16 does not hold all positions above 256: tables in bf16 would repeat their angles."""
    model = twin(oracle()).bfloat16()
    far = torch.arange(3000, 3010)[None]
    with torch.no_grad():
        near = model(tokens(1, 10)).float()
        moved = model(tokens(1, 10), position_ids=far).float()
    # RoPE is relative: only rounding to bf16 makes a difference.
    assert distance(near, moved) <= 0.05 * near.abs().max()


# ---- errors


def test_misuse_of_the_cache_raises():
    model = twin(oracle())
    cache = KVCache()
    with pytest.raises(ValueError, match="no_grad"):
        model(tokens(2, 3), cache=cache)
    with torch.no_grad():
        model(tokens(2, 3), cache=cache)
        with pytest.raises(ValueError, match="2 rows, the new tokens 1"):
            model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="truncate a cache of 3 tokens to 4"):
        cache.truncate(4)
