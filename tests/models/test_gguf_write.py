"""Tests of writing a model and its tokenizer to a GGUF file.

Oracles: transformers reads the same file (weights bit for bit, logits, tokenizer), the gguf
package's reader (names, fields, types). Round trip: our own loader, exact in F32 and within each
format's rounding below that. Errors: values that GGUF or llama.cpp does not support, and crashes.
"""

import weakref
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.chats import CHATML, backend
from helpers.tiny import LLAMA3, oracle, tokens, twin
from minilora.data import Tokenizer, load_tokenizer
from minilora.models.gguf import write as gguf_write
from minilora.models.gguf.read import GGUFCheckpoint, read_tokenizer_fields, unpermute
from minilora.models.gguf.tokenizer import WORDS, cut_words
from minilora.models.gguf.tokenizer_export import to_fields
from minilora.models.gguf.write import permute
from minilora.models.save import save_model

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
KINDS |= {"q4_0": "Q4_0"}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def written(path: Path, model: nn.Module, **options) -> Path:
    save_model(model, path / "m.gguf", format="gguf", **options)
    return path / "m.gguf"


def mine(path: Path) -> nn.Module:
    return ml.load_model(path, dtype="float32", device="cpu")


def theirs(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def logits(model: nn.Module, **options) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens(2, 30), **options)
    return out if isinstance(out, torch.Tensor) else out.logits


# ---- oracles and round trip


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"head_dim": 32, "num_key_value_heads": 4}]
    + [{"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}]
    + [{"family": "mistral", "sliding_window": None}],
    ids=["llama", "tied", "wide heads", "theta", "mistral"],
)
def test_an_f32_file_equals_the_model(tmp_path, fields):
    model = twin(oracle(**fields))
    path = written(tmp_path, model, dtype="float32")
    again, reference = mine(path), theirs(path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(reference.state_dict()[name], value), name
    assert torch.equal(logits(again), logits(model))
    assert_rounded(logits(reference), logits(model), rounding(model, logits))
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"


def test_biases_and_linear_scaling(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = twin(oracle(attention_bias=True, mlp_bias=True, rope_parameters=scaling))
    again = mine(written(tmp_path, model))
    assert again.config.rope == model.config.rope
    assert torch.equal(logits(again), logits(model))


def test_llama3_scaling_is_found_again(tmp_path):
    scaling = LLAMA3 | {
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "factor": 32.0,
    }
    model = twin(oracle(rope_parameters=scaling))
    again = mine(written(tmp_path, model))
    assert again.config.rope == model.config.rope
    far = {"position_ids": torch.arange(7000, 7030)[None]}
    assert torch.equal(logits(again, **far), logits(model, **far))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "q8_0", "q4_0", None], ids=str)
def test_each_type_rounds_as_its_definition_says(tmp_path, dtype):
    """F16 and BF16 round by half a unit, 2^-11 and 2^-8.

    Q8_0 rounds by half a step of max/127 per block, and rounds that scale to fp16. Q4_0 has steps of
    max/8, and codes to 7 on the side opposite to the largest value, where it loses up to a step.
    """
    model = twin(oracle(intermediate_size=128))
    path = written(tmp_path, model, dtype=dtype)
    again, reference = mine(path).state_dict(), theirs(path).state_dict()
    name_of_type = KINDS[str(dtype or "float32").removeprefix("torch.")]
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], reference[name]), name
        if value.dim() == 1 or dtype is None:
            bound = torch.zeros(())
        elif dtype in ("q8_0", "q4_0"):
            largest = (
                value.view(value.shape[0], -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32)
            )
            in_8_bits = dtype == "q8_0" or name in VOCABULARY
            step = 0.5 / 127 if in_8_bits else 1 / 8
            bound = largest.reshape(value.shape) * (step + 2**-11) * 1.001
        else:
            bound = value.abs() * 2.0 ** (-11 if dtype == torch.float16 else -8) + 2**-25
        assert ((again[name] - value).abs() <= bound).all(), name
    types = {
        tensor.name: (tensor.tensor_type.name, len(tensor.shape))
        for tensor in gguf.GGUFReader(path).tensors
    }
    assert len(types) == 3 * 9 + 3
    ends = {types.pop("output.weight"), types.pop("token_embd.weight")}
    assert ends == {("Q8_0" if dtype == "q4_0" else name_of_type, 2)}
    assert all(kind == ("F32" if dims == 1 else name_of_type) for kind, dims in types.values())


def test_f16_logits_equal_those_of_weights_rounded_to_fp16(tmp_path):
    """F16 equals a cast of every matrix to fp16 and back, exactly."""
    model = twin(oracle())
    again = mine(written(tmp_path, model, dtype="float16"))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.half().float()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_rows_that_blocks_do_not_fit_are_fp16(tmp_path, dtype):
    path = written(tmp_path, twin(oracle(intermediate_size=100)), dtype=dtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(3)} == {"F16"}  # rows of 100
    assert types["blk.0.ffn_up.weight"] == KINDS[dtype]  # rows of 64
    assert torch.isfinite(logits(mine(path))).all()


def test_the_default_is_the_models_own_dtype_and_a_folder_gets_model_gguf(tmp_path):
    model = twin(oracle()).bfloat16()
    save_model(model, tmp_path, format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    again = ml.load_model(tmp_path / "model.gguf", dtype="bfloat16", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_adapters_are_merged_in_one_rounding(tmp_path):
    model = twin(oracle())
    ml.quantize_model(model)  # test_matrix.py tests dense bases
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    with pytest.raises(ValueError, match="merge=True"):
        written(tmp_path, model)
    merged = mine(written(tmp_path, model, merge=True))
    assert_rounded(logits(merged), logits(model), rounding(merged, logits))


@pytest.mark.parametrize("heads, half, columns", [(1, 1, 0), (4, 8, 64), (3, 2, 1)])
def test_permute_is_undone_by_unpermute(heads, half, columns):
    rows = torch.randn(heads * 2 * half, *([columns] if columns else []))
    assert torch.equal(unpermute(permute(rows, heads), heads), rows)
    assert heads * half == 1 or not torch.equal(permute(rows, heads), rows) or half == 1


def test_qwen2_is_neither_permuted_nor_renamed():
    class Qwen2:
        model_type = "qwen2"

    assert gguf_write.permuted_heads(Qwen2()) == {}
    assert gguf_write.ARCHITECTURES["qwen2"] == "qwen2"


# ---- the tokenizer


def tokenizer(pre: str, bos: bool = False) -> Tokenizer:
    made = backend(["<s>", "</s>"], "<s>" if bos else None)
    made.add_tokens(["<tool>"])
    cut_words(made, pre)
    if pre == "llama-bpe":
        made.model.ignore_merges = True
    return Tokenizer(made, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, CHATML)


TEXTS = ["it's  1234\n\nhello wolrd </s><tool>\t x", "éa\u0301 ÄÖ 日本 🙂   hell", " as\r\nAS'S 5"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pre", WORDS)
def test_tokenizer_comes_back_the_same(tmp_path, pre, bos):
    made = tokenizer(pre, bos)
    model = twin(oracle(vocab_size=len(made) + 3))  # embeddings are often padded
    path = written(tmp_path, model, tokenizer=made)
    again = load_tokenizer(path)
    for text in TEXTS:
        for special in (True, False):
            assert again.encode(text, add_special_tokens=special) == made.encode(
                text, add_special_tokens=special
            )
        assert again.decode(made.encode(text)) == made.decode(made.encode(text))
    assert again.special_tokens == made.special_tokens
    assert again.chat_template == CHATML
    fields = read_tokenizer_fields(path)
    assert (fields.pre, fields.add_bos, fields.add_eos) == (pre, bos, False)
    assert fields.tokens[-4:] == ["<tool>", *(f"[PAD{i}]" for i in range(len(made), len(made) + 3))]
    assert fields.token_types[-6:] == [3, 3, 4, 5, 5, 5]
    assert mine(path).config.eos_token_id == made.eos_token_id
    # transformers does not split SmolLM2's digits (test_gguf_tokenizer.py), and does not know
    # DeepSeek's words.
    if pre not in ("smollm", "deepseek-v3"):
        reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        # In a llama file, transformers omits Qwen's normaliser.
        for text in TEXTS[::2] if pre == "qwen2" else TEXTS:
            assert reference.encode(text, add_special_tokens=False) == made.encode(
                text, add_special_tokens=False
            )
        assert reference.chat_template == CHATML


def test_transformers_tokenizers_are_taken_too():
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer("qwen2").backend, eos_token="</s>")
    fields = to_fields(made, 300)
    assert (fields.pre, fields.eos_token_id, fields.bos_token_id) == (
        "qwen2",
        made.eos_token_id,
        None,
    )


def test_tokenizers_that_gguf_would_encode_differently_are_refused(tmp_path):
    from tokenizers import pre_tokenizers, processors

    model = twin(oracle(vocab_size=300))

    def fails(made, message: str, **options) -> None:
        with pytest.raises(ValueError, match=message):
            written(tmp_path, model, tokenizer=made, **options)
        assert not list(tmp_path.iterdir())

    other = tokenizer("gpt-2")
    other.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fails(
        other,
        "expected byte-level BPE that cuts words as one of gpt-2, .*, got BPE cut by .*Whitespace",
    )
    other = tokenizer("qwen2")
    other.backend.normalizer = None
    fails(other, "expected byte-level BPE")
    fails(object(), "got object")
    other = tokenizer("gpt-2")
    twice = [("<s>", other.bos_token_id)]
    other.backend.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=twice
    )
    fails(other, "can only put")
    model = twin(oracle())
    fails(tokenizer("gpt-2"), "has ids up to 266, the model 97 embeddings")


# ---- errors


def test_unsupported_options_and_non_finite_values_are_refused(tmp_path):
    for model, message, options in [
        (twin(oracle(family="mistral", sliding_window=5)), "would ignore sliding_window 5", {}),
        (
            twin(oracle()),
            "must be one of float32, float16, bfloat16, q8_0, q4_0, got 'q4_k'",
            {"dtype": "q4_k"},
        ),
        (twin(oracle()), "got 'float64'", {"dtype": torch.float64}),
    ]:
        with pytest.raises(ValueError, match=message):
            written(tmp_path, model, **options)
    model = twin(oracle(intermediate_size=128))
    for value, dtype in (
        (70000.0, "float16"),
        (float("nan"), "float32"),
        (1e7, "q8_0"),
        (1e6, "q4_0"),
        (3.4e38, "bfloat16"),
    ):
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        with pytest.raises(
            ValueError, match="layers.1.mlp.up_proj.weight holds NaN or infinity in"
        ):
            written(tmp_path, model, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_the_old_file_and_only_one_tensor_is_alive(tmp_path, monkeypatch):
    path = written(tmp_path, twin(oracle(seed=1)))
    before, alive = path.read_bytes(), []

    def watch(tensor, heads):
        assert not [ref for ref in alive if ref() is not None]
        rows = permute(tensor, heads)
        alive.append(weakref.ref(rows))
        if len(alive) == 5:
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(gguf_write, "permute", watch)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, twin(oracle(seed=2)))
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == before


def test_every_name_is_read_back(tmp_path):
    model = twin(oracle(attention_bias=True, mlp_bias=True))
    assert set(GGUFCheckpoint(written(tmp_path, model)).shapes) == set(model.state_dict())
