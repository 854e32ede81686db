"""Tests of adapters on tied weights, in merged models, saved models and PEFT's files.

With tie="shared", one update applies in all places and the weights stay tied. With tie="untie",
only the named place changes. PEFT's merge adds both updates, or a single one, to the one tied
weight, and the merged model differs. Logits are up to 10 in size; 1e-6 relative is about sixteen
fp32 roundings (6e-8 each), and merging regroups sums over three layers: 1e-5.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from helpers.kinds import TOKENS, build, close, output, shake
from helpers.tiny import KINDS, oracle, twin
from helpers.toy import FAST, Letters, adapters, llama, rows
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE, base_state_dict
from minilora.lora.registry import lora_layers

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TARGETS = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]]
targets = pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
ties = pytest.mark.parametrize("tie", ["shared", "untie"])


def inject(model: nn.Module, tie: str | None, **fields) -> list[str]:
    return ml.inject(
        model, ml.LoRAConfig(**{"r": 4, "tie": tie, "target_modules": ["q_proj"]} | fields)
    )


def weights(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


# ---- oracle: PEFT


@targets
@ties
def test_files_are_exchanged_with_peft_in_both_directions(tmp_path, targets, tie):
    from peft import LoraConfig, PeftModel, get_peft_model

    shared = tie == "shared"
    config = LoraConfig(
        r=4, target_modules=targets, ensure_weight_tying=shared, task_type="CAUSAL_LM"
    )
    theirs = shake(get_peft_model(build("tied"), config)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = build("tied")
    names = ml.load_adapter(ours, tmp_path / "theirs")
    close(output(ours), output(theirs))
    assert {*names} >= ({EMBEDDING, HEAD} if shared else {*targets} & {HEAD})
    ml.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(build("tied"), str(tmp_path / "ours")).eval()
    assert torch.equal(output(again), output(theirs))
    again.save_pretrained(str(tmp_path / "again"))
    one, other, third = (
        load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("theirs", "ours", "again")
    )
    assert {key for key in one if "base_layer" not in key} == set(other)
    assert all(
        torch.equal(one[key], other[key]) and torch.equal(one[key], third[key]) for key in other
    )


@targets
def test_a_shared_update_is_shared_in_peft_too(tmp_path, targets):
    from peft import PeftModel

    ours = build("tied")
    inject(ours, "shared", target_modules=targets)
    ml.save_adapter(shake(ours), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["ensure_weight_tying"] is True
    theirs = PeftModel.from_pretrained(build("tied"), str(tmp_path)).eval()
    close(output(theirs), output(ours))


@ties
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_modules_to_save_are_exchanged_with_peft(tmp_path, tie, part):
    from peft import LoraConfig, PeftModel, get_peft_model

    fields = {"target_modules": ["q_proj"], "modules_to_save": [part]}
    config = LoraConfig(r=4, ensure_weight_tying=tie == "shared", **copy.deepcopy(fields))
    theirs = shake(get_peft_model(build("tied"), config)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = build("tied")
    ml.load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(output(ours), output(theirs))
    mine = build("tied")
    inject(mine, tie, **fields)
    ml.save_adapter(shake(mine), tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / WEIGHTS_FILE).keys()
        == load_file(tmp_path / "theirs" / WEIGHTS_FILE).keys()
    )
    again = PeftModel.from_pretrained(build("tied"), str(tmp_path / "ours")).eval()
    close(output(again), output(mine))
    assert (output(mine) - output(build("tied"))).abs().max() > 0.1


def test_lora_on_a_tied_head_alone_is_merged_without_the_embedding(tmp_path):
    """PEFT's merge_and_unload adds the update to the embedding, too, and so changes the logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    theirs = shake(
        get_peft_model(build("tied"), LoraConfig(r=4, target_modules=["lm_head"]))
    ).eval()
    before = output(theirs)
    assert (output(theirs.merge_and_unload()) - before).abs().max() > 1
    for model in (build("tied"), twin(build("tied"))):
        inject(model, "untie", target_modules=["lm_head"])
        expected = output(shake(model))
        merged = ml.merge(model)
        close(output(merged), expected, 1e-5)
        assert torch.equal(weights(merged)[0], build("tied").model.embed_tokens.weight)
        if hasattr(model, "hidden"):
            ml.save_model(model, tmp_path / "ours", merge=True)
            folder = tmp_path / "ours"
        else:
            merged.save_pretrained(folder := tmp_path / "theirs")
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert again.config.tie_word_embeddings is False
        close(output(again), expected, 1e-5)


# ---- property


@ties
@targets
def test_new_inactive_merged_and_ejected_models_are_exact(tie, targets):
    for model in (build("tied"), twin(build("tied"))):
        base, state, modules = (
            output(model),
            copy.deepcopy(model.state_dict()),
            dict(model.named_modules()),
        )
        names = inject(model, tie, target_modules=targets)
        assert torch.equal(output(model), base)  # a new adapter changes nothing
        assert {EMBEDDING, HEAD} <= {*names} or tie == "untie"
        trainable = ml.count_parameters(model).trainable
        assert trainable == sum(
            p.numel() for p in {p for p in model.parameters() if p.requires_grad}
        )
        expected = output(shake(model))
        for other in (copy.deepcopy(model), model):
            merged = ml.merge(other)
            close(output(merged), expected, 1e-5)
            assert (
                (weights(merged)[0] is weights(merged)[1])
                == (tie == "shared")
                == merged.config.tie_word_embeddings
            )
        assert len(ml.merge_report(model).layers) == len(names)
        with ml.disable_adapters(model):
            assert torch.equal(output(model), base)
        found = base_state_dict(model)
        assert found.keys() == state.keys() and all(
            torch.equal(found[key], state[key]) for key in state
        )
        ml.eject(model)
        assert torch.equal(output(model), base) and dict(model.named_modules()) == modules


def test_the_shared_update_gets_the_gradient_of_both_uses():
    model = twin(oracle(tie_word_embeddings=True))
    inject(model, "shared", target_modules=["lm_head"])
    shake(model)
    model(TOKENS).square().mean().backward()
    A, B = (getattr(model.lm_head.adapters["default"], f"lora_{x}") for x in "AB")
    dense = twin(oracle(tie_word_embeddings=True))
    dense.load_state_dict(ml.merge(model).state_dict())
    dense(TOKENS).square().mean().backward()
    G = dense.lm_head.weight.grad  # dL/dE = dL/dΔE, (V, D); ΔE = 2 (B A)ᵀ
    close(A.grad, 2 * (G @ B).T, 1e-5)  # fp32 sums in another order
    close(B.grad, 2 * (A @ G).T, 1e-5)


@ties
@pytest.mark.parametrize("parts", [["embed_tokens"], ["lm_head"]], ids=" ".join)
def test_whole_modules_are_tied_as_declared(tie, parts, tmp_path):
    model = twin(build("tied"))
    base = output(model)
    inject(model, tie, modules_to_save=parts)
    assert torch.equal(output(model), base)
    expected = output(shake(model))
    assert (weights(model)[0] is weights(model)[1]) == (tie == "shared")
    for merged in (ml.merge(model), copy.deepcopy(model)):
        ml.save_model(merged, tmp_path / "saved", merge=bool(lora_layers(merged)))
        again = ml.load_model(tmp_path / "saved", dtype="float32", device="cpu")
        close(output(again), expected, 1e-5)
        assert again.config.tie_word_embeddings == (tie == "shared")
    ml.eject(model)
    assert torch.equal(output(model), base) and weights(model)[0] is weights(model)[1]


def test_shared_and_untied_adapters_can_be_switched():
    model = twin(build("tied"))
    outputs = {}
    for name, tie in (("both", "shared"), ("head", "untie")):
        ml.inject(model, ml.LoRAConfig(r=4, target_modules=["lm_head"], tie=tie), name=name)
        outputs[name] = output(shake(model))
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"]), name="neither")
    merged = ml.merge(model)
    # The active adapter targets neither weight, and they stay tied.
    assert weights(merged)[0] is weights(merged)[1] and merged.config.tie_word_embeddings
    for name in ("both", "head", "both"):
        ml.set_adapter(model, name)
        assert torch.equal(output(model), outputs[name])
    ml.delete_adapter(model, "both")
    ml.set_adapter(model, "head")
    assert torch.equal(output(model), outputs["head"]) and EMBEDDING not in lora_layers(model)


# ---- round trip: checkpoints of a run, saved models


@ties
def test_training_with_a_tied_adapter_resumes_exactly(tmp_path, tie):
    def run(folder, **fields):
        model = llama()  # tied
        inject(model, tie, target_modules=["embed_tokens", "q_proj"])
        config = ml.TrainConfig(
            **FAST | {"save_steps": 3, "output_dir": str(tmp_path / folder)} | fields
        )
        return ml.train(model, Letters(), rows(24), config), adapters(model)

    whole, expected = run("whole")
    assert whole.losses[-1] < whole.losses[0]
    resumed, found = run("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.losses == whole.losses
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )
    assert all(tensor.any() for tensor in found.values())


@ties
@pytest.mark.parametrize(
    ("format", "kind"),
    [(format, kind) for format in ("safetensors", "bnb-4bit") for kind in ("tied", "gemma3")]
    + [("gguf", "tied"), ("gguf", "qwen2 tied, wide heads, linear")],
)
def test_a_saved_model_is_tied_as_declared(tmp_path, tie, format, kind):
    model = twin(oracle(**KINDS[kind]))
    if format == "bnb-4bit":
        ml.quantize_model(model)
    inject(model, tie, target_modules=["embed_tokens"])
    expected = output(shake(model))
    path = tmp_path / ("m.gguf" if format == "gguf" else "m")
    ml.save_model(model, path, merge=True, format=format)
    again = ml.load_model(path, dtype="float32", device="cpu")
    close(output(again), expected, 1e-5)
    assert again.config.tie_word_embeddings == (tie == "shared")


# ---- error


def test_a_tie_must_be_declared_where_there_is_one_and_only_there():
    for fields in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ):
        model = build("tied")
        with pytest.raises(
            ValueError, match=r'\(tied\).*tie="shared"\) gives all of them.*tie="untie" changes'
        ):
            inject(model, None, **fields)
        for tie in ("shared", "untie"):
            with pytest.raises(ValueError, match=f"tie: '{tie}' would do nothing"):
                inject(build("llama"), tie, **fields)
        assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="expected one of shared, untie"):
        ml.LoRAConfig(tie="yes")


def test_layers_that_cannot_share_an_update_are_refused():
    fields = {"target_modules": ["embed_tokens"]}
    with pytest.raises(ValueError, match="one rank and strength"):
        inject(build("tied"), "shared", **fields, rank_pattern={"lm_head": 2})
    with pytest.raises(ValueError, match=r"of which \['lm_head'\] are left out"):
        inject(build("tied"), "shared", **fields, exclude_modules=["lm_head"])
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match="is for an embedding and linear layers that share"):
        inject(model, "shared", target_modules=["a"])
    assert inject(model, "untie", target_modules=["a"]) == ["a"]


def test_load_refuses_a_shared_file_with_two_updates(tmp_path):
    model = build("tied")
    inject(model, "shared", target_modules=["lm_head"])
    ml.save_adapter(shake(model), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.lora_B.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    again = build("tied")
    with pytest.raises(
        ValueError, match="ensure_weight_tying is set, but .*is not the update of the weight"
    ):
        ml.load_adapter(again, tmp_path)
    assert not lora_layers(again)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    values |= {"ensure_weight_tying": False, "target_modules": ["lm_head", "embed_tokens"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    assert len(ml.load_adapter(again, tmp_path)) == 2
