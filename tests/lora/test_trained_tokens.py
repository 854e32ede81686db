"""Tests of rows of single tokens that train (`trainable_token_indices`), against PEFT.

Files are exchanged in both directions with equal outputs, for tied and untied models. Only the rows
of the named tokens train. The base stays as it is, and merging writes the rows.
"""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from helpers.kinds import TOKENS, build, close, output, shake
from helpers.tiny import oracle, save, tokens, twin
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE
from minilora.lora.trained_parts.trained_tokens import TrainedTokens

USED = [int(TOKENS[0, 2]), int(TOKENS[1, 5])]
EMBEDDING = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
KINDS: dict[str, tuple[str, Any]] = {
    "untied": ("llama", [USED[1], 3, USED[0]]),
    "tied": ("tied", [USED[1], 3, USED[0]]),
    "by name": ("llama", {"embed_tokens": USED}),
    "both layers": ("llama", {"embed_tokens": USED, "lm_head": [4]}),
    "both layers, tied, with other rows": ("tied", {"embed_tokens": USED, "lm_head": [4]}),
    "a scaled embedding": ("gemma", USED),
    "GPT-2": ("gpt2", {"wte": USED, "wpe": [0]}),
}
kinds = pytest.mark.parametrize(("kind", "indices"), KINDS.values(), ids=KINDS)


def config(indices: Any, kind: str = "llama", **fields: Any) -> ml.LoRAConfig:
    target = "c_attn" if kind == "gpt2" else "q_proj"
    return ml.LoRAConfig(r=2, target_modules=[target], trainable_token_indices=indices, **fields)


def adapted(kind: str, indices: Any) -> Any:
    ml.inject(model := build(kind), config(indices, kind))
    return shake(model)


# ---- oracle: PEFT


@kinds
def test_files_with_trained_tokens_are_exchanged_with_peft(tmp_path, kind, indices):
    from peft import LoraConfig, PeftModel, get_peft_model

    ours = adapted(kind, indices)
    expected = output(ours)
    ml.save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(build(kind), str(tmp_path / "ours")).eval()
    close(output(theirs), expected)

    options: Any = {"target_modules": ours_targets(kind), "trainable_token_indices": indices}
    theirs = shake(get_peft_model(build(kind), LoraConfig(r=2, **options)), seed=1).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(kind)
    ml.load_adapter(again, tmp_path / "theirs")
    close(output(again), output(theirs))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ml.count_parameters(again).trainable == trained
    files = [load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    stored = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert stored["trainable_token_indices"] == indices


def ours_targets(kind: str) -> list[str]:
    return ["c_attn"] if kind == "gpt2" else ["q_proj"]


def test_gradients_of_the_rows_equal_those_of_peft(tmp_path):
    from peft import PeftModel

    ours = adapted("tied", USED)
    ml.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(build("tied"), str(tmp_path), is_trainable=True)
    for model in (ours, theirs):
        model(TOKENS).logits.square().mean().backward()
    rows = ours.model.embed_tokens.token_rows.rows.grad
    (other,) = [p.grad for name, p in theirs.named_parameters() if "tokens_delta" in name]
    close(rows, other, 1e-5)  # sums over a batch
    embedding = ours.model.embed_tokens.base_layer.weight
    assert embedding.grad is None and not embedding.requires_grad


def test_rows_of_a_grown_vocabulary_are_exchanged_with_peft(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    save(tmp_path / "base", tie_word_embeddings=True)

    def grown(seed: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(100, mean_resizing=False)
        return model.eval()

    options: Any = {"target_modules": ["q_proj"], "trainable_token_indices": [98, 97]}
    theirs = shake(get_peft_model(grown(0), LoraConfig(r=2, **options))).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = grown(1)
    ml.load_adapter(ours, tmp_path / "theirs")
    new = torch.arange(97, 100)[None]
    with torch.no_grad():
        close(ours(new).logits, theirs(new).logits)
        ml.save_adapter(ours, tmp_path / "ours")
        again = PeftModel.from_pretrained(grown(2), str(tmp_path / "ours")).eval()
        close(again(new).logits, ours(new).logits)


# ---- property


@kinds
def test_without_its_adapter_or_merged(kind, indices):
    model, expected = build(kind), output(build(kind))
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    ml.inject(model, config(indices, kind))
    close(output(model), expected)  # the rows start as those of the base
    trained = output(shake(model))
    assert not torch.equal(trained, expected)
    with ml.disable_adapters(model):
        assert torch.equal(output(model), expected)
    merged = ml.merge(model)
    close(output(merged), trained, 1e-5)
    assert not any(isinstance(module, TrainedTokens) for module in merged.modules())
    assert torch.equal(output(copy.deepcopy(model)), trained)
    ml.eject(model)
    assert torch.equal(output(model), expected) and dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_model_and_16_bits(tmp_path, tied):
    model = twin(oracle(tie_word_embeddings=tied))
    ml.inject(model, config(USED))
    expected = output(shake(model))
    ml.save_model(model, tmp_path / "merged", merge=True)
    again = ml.load_model(tmp_path / "merged", dtype="float32", device="cpu")
    close(output(again), expected, 1e-5)
    assert again.config.tie_word_embeddings == tied
    assert torch.equal(output(model), expected)  # the layers are back
    model = model.bfloat16()
    rows = model.get_input_embeddings().token_rows.rows
    assert rows.dtype == torch.float32 and output(model).dtype == torch.bfloat16


def test_training_changes_the_named_rows_only():
    model = twin(oracle(tie_word_embeddings=True))
    ml.inject(model, config([5, 9], lora_dropout=0.0))
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = tokens(2, 6, seed=3)
    ids[:, 2] = 9
    model(ids).square().mean().backward()
    optimiser.step()
    weight = model.get_input_embeddings().weight
    changed = (weight != before["model.embed_tokens.base_layer.weight"]).any(1).nonzero().flatten()
    assert changed.tolist() == [5, 9]  # 5 as a logit only


def test_two_adapters_have_their_own_rows():
    model = build("llama")
    outputs = {}
    for seed, name in enumerate(("first", "second")):
        ml.inject(model, config(USED), name=name)
        outputs[name] = output(shake(model, seed))
    for name in ("first", "second"):
        ml.set_adapter(model, name)
        assert torch.equal(output(model), outputs[name])
    with pytest.raises(ValueError, match="both train 'model.embed_tokens': use one at a time"):
        ml.set_adapter(model, ["first", "second"])


def test_padding_row_gets_no_gradient():
    base = nn.Embedding(6, 4, padding_idx=2)
    layer = TrainedTokens(base, [4, 2])
    layer.requires_grad_(True)
    layer(torch.tensor([[2, 4, 1]])).sum().backward()
    assert layer.token_rows.rows.grad.abs().sum(1).tolist() == [4.0, 0.0]


# ---- error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"trainable_token_indices": [97]},
            "has the tokens 0 to 96, got 97. Resize the vocabulary",
        ),
        ({"trainable_token_indices": {"embed_tokns": [1]}}, "matches nothing. Nearest: 'model.emb"),
        ({"trainable_token_indices": {"norm": [1]}}, "is LlamaRMSNorm, expected an Embedding"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "'model.embed_tokens' has an adapter or is one of",
        ),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "'model.embed_tokens' has an adapter",
        ),
    ],
)
def test_tokens_that_cannot_train_are_refused_and_the_model_untouched(fields, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        ml.inject(model, ml.LoRAConfig(**{"r": 2, "target_modules": ["q_proj"]} | fields))
    assert not ml.list_adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("indices", [[], {}, [1, 1], [-1], {"embed_tokens": []}, "1", [1.5]])
def test_indices_that_are_not_ids_are_refused(indices):
    with pytest.raises(ValueError, match="trainable_token_indices: expected"):
        config(indices)
