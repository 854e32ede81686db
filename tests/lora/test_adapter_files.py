"""Tests of adapter files: exchange with PEFT, equal bytes, and refused files.

Adapters are PEFT files in both directions, byte for byte, and equal adapters give equal bytes. A
file that does not fit is refused and the model stays unchanged. PEFT loads such files, mostly
without a warning, and then computes another result.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.tiny import python
from minilora.lora.config import LoRAConfig
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from minilora.lora.inject import inject
from minilora.lora.registry import lora_layers

TOKENS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def bases():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    return {"llama": LlamaForCausalLM(llama).eval(), "gpt2": GPT2LMHeadModel(gpt2).eval()}


def trained(base: nn.Module, seed: int = 0, **fields) -> nn.Module:
    """Return a copy of `base` with an adapter whose B is not zero."""
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(**{"target_modules": "all-linear"} | fields), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.adapters["default"].lora_B.data.normal_(generator=generator)
    return model


# ---- oracle; the families of minilora's decoder are in test_matrix.py


def test_gpt2_adapter_file_loads_in_peft(bases, tmp_path):
    from peft import PeftModel

    ours = trained(bases["gpt2"])
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bases["gpt2"]), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["fan_in_fan_out"] is True


def test_the_smallest_file_that_peft_reads(bases, tmp_path):
    model = trained(bases["llama"], target_modules=["q_proj"], r=4)
    save_adapter(model, tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)  # no metadata
    smallest = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(smallest))
    again = copy.deepcopy(bases["llama"])
    load_adapter(again, tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


# ---- property and round trip


def test_equal_adapters_give_equal_bytes(bases, tmp_path):
    for folder, targets in (("a", ["q_proj", "up_proj"]), ("b", ["up_proj", "q_proj"])):
        save_adapter(trained(bases["llama"], target_modules=targets), tmp_path / folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert load_file(tmp_path / "a" / WEIGHTS_FILE)[
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ].dtype == (torch.float32)


def test_loading_over_an_adapter_of_the_same_form(bases, tmp_path):
    first, second = trained(bases["llama"], seed=1), trained(bases["llama"], seed=2)
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    assert torch.equal(second(TOKENS).logits, first(TOKENS).logits)
    other = trained(bases["llama"], lora_alpha=3)
    before = other(TOKENS).logits
    with pytest.raises(ValueError, match="other layers or scaling"):
        load_adapter(other, tmp_path)
    assert torch.equal(other(TOKENS).logits, before)


# ---- error


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return edit


def edit_config(**values):
    def edit(folder):
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | values))

    return edit


def zero(tensors):
    for key in tensors:
        if "lora_B" in key:
            tensors[key].zero_()


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
BROKEN = {
    "missing key": (edit_tensors(lambda t: t.pop(KEY)), f"missing: {KEY}"),
    "half the keys": (edit_tensors(lambda t: [t.pop(k) for k in [*t][::2]]), "tensors do not fit"),
    "unexpected key": (edit_tensors(lambda t: t.update(x=torch.zeros(1))), "unexpected: x"),
    "DoRA key": (
        edit_tensors(lambda t: t.update({"m.lora_magnitude_vector": torch.ones(4)})),
        "unexpected",
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({KEY: torch.zeros(3, 8)})), "wrong shape"),
    "wrong dtype": (edit_tensors(lambda t: t.update({KEY: t[KEY].int()})), "int32"),
    "NaN": (edit_tensors(lambda t: t[KEY].fill_(float("nan"))), "NaN or infinity"),
    "untrained": (edit_tensors(zero), "allow_untrained=True"),
    "wrong rank": (edit_config(r=4), "wrong shape"),
    "other model": (edit_config(target_modules=["c_attn"]), "'c_attn' matches nothing"),
    "unsupported field": (
        edit_config(use_qalora=True),
        f"{CONFIG_FILE}: .*'use_qalora' = True would change the result",
    ),
    "unknown field": (
        edit_config(lora_aplha=32),
        "'lora_aplha' = 32 would change the result.*lora_alpha",
    ),
    "other method": (edit_config(peft_type="IA3"), f"{CONFIG_FILE}: .*reads LoRA adapters only"),
    "value out of range": (edit_config(r=0), f"{CONFIG_FILE}: r: expected >= 1, got 0"),
    "bad JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "not JSON"),
    "not an object": (lambda f: (f / CONFIG_FILE).write_text("[]"), "expected a JSON object"),
    "cut off": (
        lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-5]),
        "not a whole",
    ),
    "garbage": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\xff" * 64), "not a whole"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_damaged_or_unsuitable_file_is_refused_and_the_model_unchanged(
    bases, tmp_path, damage, message
):
    save_adapter(trained(bases["llama"]), tmp_path)
    damage(tmp_path)
    model = copy.deepcopy(bases["llama"])
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def deeper(base):
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(base.config)
    config.num_hidden_layers, config.layer_types = 4, None
    return LlamaForCausalLM(config).eval()


SILENT = {
    "keys left over": (
        edit_tensors(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)})),
        None,
    ),
    "half of the keys missing": (edit_tensors(lambda t: [t.pop(k) for k in [*t][::2]]), None),
    "all keys missing": (edit_tensors(lambda t: [t.pop(k) for k in [*t]]), None),
    "NaN": (edit_tensors(lambda t: t[KEY].fill_(float("nan"))), None),
    "a base of 4 layers instead of 2": (lambda folder: None, deeper),
}


# PEFT gives at most this warning for any of these files.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(("damage", "other"), SILENT.values(), ids=SILENT)
def test_files_that_peft_loads_with_a_wrong_result_are_refused(bases, tmp_path, damage, other):
    """PEFT loads extra keys and NaN silently, and warns of missing keys and of a deeper base.

    Layers with missing keys give the base's output; NaN in the file gives NaN.
    """
    from peft import PeftModel

    save_adapter(trained(bases["llama"]), tmp_path)
    damage(tmp_path)
    base = other(bases["llama"]) if other else bases["llama"]
    PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    with pytest.raises(ValueError, match="do not fit|NaN or infinity"):
        load_adapter(copy.deepcopy(base), tmp_path)


def test_the_config_s_bytes_do_not_depend_on_the_hash_seed(tmp_path):
    """PEFT writes targets in the order of a set, which differs between processes."""
    code = """
import sys, torch, minilora as ml
from torch import nn
torch.manual_seed(0)
model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcdefgh"})
config = ml.LoRAConfig(r=2, target_modules=set("abcdef"), exclude_modules={"a", "b"}, modules_to_save={"g", "h"})
ml.inject(model, config)
ml.save_adapter(model, sys.argv[1])
"""
    written = []
    for seed in "01":
        python(code, tmp_path, PYTHONHASHSEED=seed)
        written.append([(tmp_path / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)])
    assert written[0] == written[1]


def test_neutral_fields_of_newer_files_are_accepted(bases, tmp_path):
    save_adapter(trained(bases["llama"]), tmp_path)
    edit_config(
        some_new_field=None,
        use_dora=False,
        loftq_config={"loftq_bits": 4},
        peft_version="9.9",
        qalora_group_size=16,
    )(tmp_path)
    assert len(load_adapter(copy.deepcopy(bases["llama"]), tmp_path)) == 14


def test_missing_files_raise(bases, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_adapter(bases["llama"], tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load_adapter(bases["llama"], tmp_path)


def test_saving_a_diverged_or_unknown_adapter_raises(bases, tmp_path):
    model = trained(bases["llama"])
    with pytest.raises(ValueError, match="adapter: 'typo' matches nothing"):
        save_adapter(model, tmp_path, name="typo")
    next(iter(lora_layers(model).values())).adapters["default"].lora_A.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_adapter(model, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_untrained_on_request_and_partly_untrained_with_a_warning(bases, tmp_path):
    model = copy.deepcopy(bases["llama"])
    inject(model)
    save_adapter(model, tmp_path)
    load_adapter(copy.deepcopy(bases["llama"]), tmp_path, allow_untrained=True)
    next(iter(lora_layers(model).values())).adapters["default"].lora_B.data.fill_(1)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="3 of 4 lora_B are all zero"):
        load_adapter(copy.deepcopy(bases["llama"]), tmp_path)
