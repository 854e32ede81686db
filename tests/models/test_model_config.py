"""Tests of reading and writing config.json as transformers does.

Oracle: the config classes of transformers, in the spelling of versions 4 and 5. Round trip: to_hf
and back, and through transformers. Errors: another architecture, a quantised checkpoint,
contradictions, and every unknown field that would change the result.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers.tiny import LLAMA3, SIZES
from minilora.models.config import FAMILIES, FULL, SLIDING, DecoderConfig
from minilora.models.rope_config import Rope, frequencies

# config.json as published: Llama 3.2 1B (transformers 4 spelling) and SmolLM2, with fields that
# have no effect here.
LLAMA_32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2 = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "is_llama_config": True},
    **{
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    **{
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "rope_theta": 100000,
        "rope_interleaved": False,
    },
    **{
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192,
    },
    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "rms_norm_eps": 1e-05},
}
QWEN25 = {
    **{
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
    },
    **{
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "vocab_size": 151936,
    },
    **{
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
    **{
        "sliding_window": 32768,
        "max_window_layers": 24,
        "use_sliding_window": False,
        "use_mrope": False,
    },
    **{
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
}
QWEN3 = QWEN25 | {
    **{
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "hidden_size": 1024,
    },
    **{
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "attention_bias": False,
        "rope_scaling": None,
    },
    **{"sliding_window": None, "max_window_layers": 28},
}
GEMMA3 = {
    **{
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 1152,
        "head_dim": 256,
    },
    **{
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 26,
    },
    **{
        "vocab_size": 262144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
    },
    **{
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
    **{
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    },
    **{
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "max_position_embeddings": 32768,
    },
    **{"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "torch_dtype": "bfloat16"},
}
BASE = {"model_type": "llama", **SIZES}


# ---- oracle: transformers


def test_published_configs_are_read():
    llama = DecoderConfig.from_hf(LLAMA_32)
    assert llama.rope == Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert (llama.eos_token_id, llama.dtype, llama.tie_word_embeddings) == (
        (128001, 128008, 128009),
        "bfloat16",
        True,
    )
    smol = DecoderConfig.from_hf(SMOLLM2)
    assert (smol.head_dim, smol.num_key_value_heads, smol.rope, smol.sliding_window) == (
        64,
        3,
        Rope(100000),
        None,
    )
    for qwen, head_dim in (
        (DecoderConfig.from_hf(QWEN25), 64),
        (DecoderConfig.from_hf(QWEN3), 128),
    ):
        assert (qwen.head_dim, qwen.rope, {*qwen.layer_types}) == (head_dim, Rope(1e6), {FULL})
    gemma = DecoderConfig.from_hf(GEMMA3)
    assert (gemma.rope, gemma.rope_of(FULL), gemma.rope_of(SLIDING)) == (
        Rope(1e6),
        Rope(1e6),
        Rope(1e4),
    )
    assert (
        gemma.tie_word_embeddings
        and gemma.layer_types == ((SLIDING,) * 5 + (FULL,)) * 4 + (SLIDING,) * 2
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_5_spelling_and_defaults(model_type):
    """A config of transformers is read in full and as differences.

    A file with few fields gets the defaults of transformers.
    """
    rope = {"rope_type": "default", "rope_theta": 7.0}
    kinds = {FULL: rope, SLIDING: rope | {"rope_theta": 5.0}}
    gemma = FAMILIES[model_type].gemma
    theirs = AutoConfig.for_model(
        model_type, **SIZES, dtype="float16", rope_parameters=kinds if gemma else rope
    )
    ours = DecoderConfig.from_hf(theirs.to_dict())
    assert ours == DecoderConfig.from_hf(json.loads(theirs.to_json_string()))
    assert (ours.rope, ours.dtype, ours.head_dim) == (
        Rope(7.0),
        "float16",
        getattr(theirs, "head_dim", 16),
    )
    assert ours.rope_of(SLIDING) == Rope(5.0 if gemma else 7.0)
    little = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"} | {
        "num_attention_heads": 32
    }
    ours = DecoderConfig.from_hf({"model_type": model_type, **little})
    theirs = AutoConfig.for_model(model_type, **little)
    shared = (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    for name in (
        shared + ("query_pre_attn_scalar", "bos_token_id", "eos_token_id", "pad_token_id") * gemma
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 2)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert list(ours.layer_types) == getattr(theirs, "layer_types", list(ours.layer_types))
    if gemma:
        for kind in (FULL, SLIDING):
            assert ours.rope_of(kind).theta == theirs.rope_parameters[kind]["rope_theta"]
        return  # its class accepts no null
    # null differs from an absent field.
    nothing = {
        "num_key_value_heads": None,
        "head_dim": None,
        "sliding_window": None,
    }
    ours = DecoderConfig.from_hf({"model_type": model_type, **little, **nothing})
    assert (ours.num_key_value_heads, ours.head_dim, ours.sliding_window) == (32, 2, None)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@given(
    model_type=st.sampled_from(["qwen2", "qwen3"]),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "use_sliding_window": st.booleans(),
            "sliding_window": st.none() | st.integers(1, 9),
            "max_window_layers": st.integers(0, 4),
            "num_hidden_layers": st.sampled_from([3, 30]),
        },
    ),
)
def test_qwens_windows_are_where_transformers_has_them(model_type, fields):
    theirs = AutoConfig.for_model(model_type, **SIZES | fields)
    ours = DecoderConfig.from_hf({"model_type": model_type} | SIZES | fields)
    assert (ours.sliding_window, list(ours.layer_types)) == (
        theirs.sliding_window,
        theirs.layer_types,
    )


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, LLAMA3],
    ids=["linear", "old name of the kind", "llama3"],
)
def test_frequencies_equal_transformers(scaling):
    theirs = LlamaConfig(**SIZES, rope_theta=500.0, rope_scaling=dict(scaling))
    expected, factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs)
    rope = DecoderConfig.from_hf({**BASE, "rope_theta": 500.0, "rope_scaling": scaling}).rope
    assert factor == 1.0
    assert torch.equal(frequencies(rope, 16), expected)
    assert not torch.equal(frequencies(rope, 16), frequencies(Rope(500.0), 16))


def test_llama3_without_its_original_length_takes_the_context():
    scaling = {
        name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"
    }
    config = DecoderConfig.from_hf(
        {**BASE, "max_position_embeddings": 512, "rope_parameters": scaling}
    )
    assert config.rope.original_max_position_embeddings == 512


# ---- round trip

ropes = st.one_of(
    st.builds(Rope, theta=st.floats(10, 1e7)),
    st.builds(Rope, theta=st.floats(10, 1e7), kind=st.just("linear"), factor=st.floats(1, 32)),
    st.builds(Rope, theta=st.floats(10, 1e7), kind=st.just("llama3"), factor=st.floats(1, 32)),
)


@given(
    rope=ropes,
    family=st.sampled_from(list(FAMILIES)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    window=st.none() | st.integers(1, 99),
    kinds=st.lists(st.sampled_from([FULL, SLIDING]), min_size=3, max_size=3),
    eos=st.none() | st.integers(0, 96) | st.tuples(st.integers(0, 96), st.integers(0, 96)),
)
def test_to_hf_and_back(rope, family, flags, window, kinds, eos):
    own = {"attention_bias": flags[1], "mlp_bias": flags[2], "sliding_window": window}
    if window:
        own["layer_types"] = tuple(kinds)
    elif FAMILIES[family].gemma:
        own["layer_types"] = (FULL,) * 3
    own |= {"query_pre_attn_scalar": 99, "rope_local_base_freq": 77.0}
    own = {name: value for name, value in own.items() if name in FAMILIES[family].own}
    config = DecoderConfig(
        **SIZES,
        rope=rope,
        model_type=family,
        tie_word_embeddings=flags[0],
        eos_token_id=eos,
        dtype="bfloat16",
        **own,
    )
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "source",
    [
        *(
            LLAMA_32,
            SMOLLM2,
            QWEN25,
            QWEN3,
            GEMMA3,
            GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        SIZES | {"model_type": "gemma3_text"},
        SIZES | {"model_type": "mistral", "sliding_window": 7},
        SIZES | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
        SIZES | {"model_type": "qwen3", "attention_bias": True},
    ],
)
def test_written_config_means_the_same_to_transformers(tmp_path, source):
    ours = DecoderConfig.from_hf(source)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    again = DecoderConfig.from_hf(json.loads(theirs.to_json_string()))
    assert again == ours
    assert theirs.architectures == [AutoModelForCausalLM._model_mapping[type(theirs)].__name__]
    # transformers before 4.53 does not write layer_types.
    written = {name: value for name, value in ours.to_hf().items() if name != "layer_types"}
    assert DecoderConfig.from_hf(written) == ours


def test_harmless_fields_are_kept():
    written = DecoderConfig.from_hf(SMOLLM2).to_hf()
    assert written["is_llama_config"] is True
    assert written["transformers.js_config"] == SMOLLM2["transformers.js_config"]


# ---- errors


@pytest.mark.parametrize(
    "change", [{"model_type": "gpt2"}, {"model_type": None}, {"architectures": ["Other"]}]
)
def test_unknown_architecture_lists_the_known_ones_and_the_remedy(change):
    with pytest.raises(ValueError, match=r"llama \(LlamaForCausalLM\), mistral .*ml\.inject"):
        DecoderConfig.from_hf(BASE | change)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"frobnicate": 0.5}, "frobnicate = 0.5 is unknown and may change the result"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"sliding_window": 9}, "LlamaForCausalLM has no such field"),
        ({"model_type": "mistral", "mlp_bias": True}, "MistralForCausalLM has no such field"),
        ({"model_type": "qwen2", "attention_bias": True}, "Qwen2ForCausalLM has no such field"),
        ({"use_sliding_window": True}, "LlamaForCausalLM has no such field"),
        (
            {"model_type": "mistral", "sliding_window": 0},
            "sliding_window must be null or at least 1, got 0",
        ),
        (
            {"model_type": "qwen3", "layer_types": [SLIDING] * 3},
            "with a sliding_window; it is None",
        ),
        ({"model_type": "qwen3", "layer_types": [FULL] * 2}, "kind of each of 3 layers"),
        (
            {"model_type": "qwen3", "layer_types": [FULL, "chunked_attention", FULL]},
            "chunked_attention",
        ),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0",
        ),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        (
            {"model_type": "gemma3_text", "sliding_window": None},
            "with a sliding_window; it is None",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 7.0}},
            "expected those of full_attention",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {SLIDING: {"factor": 2.0}}},
            "θ only of sliding_attention",
        ),
        ({"query_pre_attn_scalar": 64}, "LlamaForCausalLM has no such field"),
        ({"no_rope_layers": [1, 0, 1]}, "LlamaForCausalLM has no such field"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "a 1 or a 0 for each of 3 layers"),
        ({"model_type": "smollm3", "no_rope_layers": 4}, "a 1 or a 0 for each of 3 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 1]}, "rotates q and k. or a 0"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval 0"),
        ({"model_type": "gemma2"}, "unknown architecture"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive whole number, got '3'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "not of a dense decoder"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor > 0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
            "may change the result",
        ),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "may change the result"),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor > low_freq_factor",
        ),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "two different rotations",
        ),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"head_dim": 15}, "odd"),
    ],
)
def test_unknown_or_contradicting_fields_raise(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(BASE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"frobnicate": None},
        {"frobnicate": False},
        {"frobnicate": []},
        {"_attn_implementation_autoset": True},
        {"partial_rotary_factor": 1.0},
        {"sliding_window": None},
        {"layer_types": ["full_attention"] * 3},
        {"quantization_config": None},
        {"temperature": 0.6},
    ],
)
def test_fields_without_effect_are_accepted(change):
    assert DecoderConfig.from_hf(BASE | change) == DecoderConfig.from_hf(BASE)
