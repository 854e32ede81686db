"""Tests of DoRA on embeddings and convolutions against PEFT.

Files are exchanged in both directions; outputs, gradients, dropout and merged weights agree. The
norms are sums of at most 97 squares in fp32 and are computed in another way than PEFT's. So they
differ by at most 97 · 2⁻²⁴ = 6e-6 relative, and `RELATIVE` is the next power of ten.
"""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from helpers.kinds import IMAGES, TOKENS, Images, build, close, output, shake
from minilora.lora.files.save_load import WEIGHTS_FILE
from minilora.lora.registry import lora_layers
from minilora.training.config import TrainConfig
from minilora.training.optim.param_groups import new_optimizer

RELATIVE = 1e-5
KINDS = {
    "embedding": ("llama", ["embed_tokens"]),
    "a scaled embedding": ("gemma", ["embed_tokens"]),
    "Conv1d, padding same": ("images", ["long"]),
    "Conv2d, stride, padding, bias": ("images", ["flat"]),
    "Conv2d without a bias": ("images", ["one"]),
    "Conv3d": ("images", ["deep"]),
    "all of them": ("images", ["flat", "one", "long", "deep", "words", "head"]),
}
kinds = pytest.mark.parametrize(("kind", "targets"), KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Skip fsync and PEFT's model card, which these tests do not need."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


def fields(targets: list[str], **more) -> dict:
    return {"r": 2, "lora_alpha": 6, "target_modules": targets, "use_dora": True} | more


def adapted(kind: str, targets: list[str], **more) -> nn.Module:
    model = build(kind)
    ml.inject(model, ml.LoRAConfig(**fields(targets, **more)))
    return shake(model)


def in_peft(kind: str, folder, **more) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(build(kind), str(folder), **more).eval()


# ---- oracle: PEFT


@kinds
def test_a_file_of_peft_gives_its_output_and_is_saved_again(kind, targets, tmp_path):
    theirs = shake(get_peft_model(build(kind), LoraConfig(**fields(targets)))).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = build(kind)
    ml.load_adapter(ours, tmp_path / "theirs")
    close(output(ours), output(theirs), RELATIVE)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ml.count_parameters(ours).trainable == trained
    ml.save_adapter(ours, tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / WEIGHTS_FILE)
    found = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    assert set(found) == {key for key in expected if ".base_layer.weight" not in key}
    assert all(torch.equal(found[key], expected[key]) for key in found)  # also the shapes


@kinds
def test_our_file_gives_our_output_in_peft_and_here(kind, targets, tmp_path):
    ours = adapted(kind, targets)
    expected = output(ours)
    assert (expected - output(build(kind))).abs().max() > 1e-3  # the adapter has an effect
    ml.save_adapter(ours, tmp_path)
    close(output(in_peft(kind, tmp_path)), expected, RELATIVE)
    again = build(kind)
    ml.load_adapter(again, tmp_path)
    assert torch.equal(output(again), expected)


@kinds
def test_a_new_adapter_has_the_lengths_of_peft(kind, targets, tmp_path):
    theirs = get_peft_model(build(kind), LoraConfig(**fields(targets)))
    model = build(kind)
    ml.inject(model, ml.LoRAConfig(**fields(targets)))
    for path, layer in lora_layers(model).items():
        other = theirs.get_submodule(f"base_model.model.{path}").lora_magnitude_vector["default"]
        m = layer.adapters["default"].tensors(layer.base_layer)["lora_magnitude_vector"]
        assert m.shape == other.weight.shape
        close(m, other.weight, RELATIVE)


@pytest.mark.parametrize(
    ("targets", "dropout"),
    [
        (["words"], 0.0),  # token ids cannot be dropped: such a config is refused
        (["long"], 0.0),
        (["flat"], 0.0),
        (["flat"], 0.4),
        (["one"], 0.4),
        (["deep"], 0.4),
        (KINDS["all of them"][1], 0.0),
        (KINDS["all of them"][1], 0.4),
    ],
)
def test_training_outputs_and_gradients_equal_pefts(targets, dropout, tmp_path):
    """The masks are equal: both libraries draw one per layer, in the same order."""
    ours = adapted("images", targets, lora_dropout=dropout)
    ml.save_adapter(ours, tmp_path)
    theirs = in_peft("images", tmp_path, is_trainable=True)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        outputs.append(model(IMAGES))
        outputs[-1].square().sum().backward()
    close(outputs[0], outputs[1], RELATIVE)
    compared = 0
    for path, layer in lora_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        for name, parameter in layer.adapters["default"].named_parameters():
            expected = parameter_of_peft(other, name).grad
            close(parameter.grad, expected.view(parameter.shape), 10 * RELATIVE)  # sums, 5 layers
            assert parameter.grad.any(), (path, name)
            compared += 1
    assert compared == 3 * len(targets)


def parameter_of_peft(layer: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter of PEFT's layer for `lora_A`, `lora_B` or `lora_magnitude_vector`."""
    embedding = getattr(layer, name.replace("lora_", "lora_embedding_"), {})
    if "default" in embedding:
        return embedding["default"]
    return getattr(layer, name)["default"].weight


@kinds
def test_merged_weights_equal_pefts_and_outputs_stay(kind, targets, tmp_path):
    model = adapted(kind, targets)
    expected = output(model)
    ml.save_adapter(model, tmp_path)
    merged = ml.merge(model)
    close(output(merged), expected, RELATIVE)
    theirs = in_peft(kind, tmp_path).merge_and_unload()
    for path in lora_layers(model):
        close(merged.get_submodule(path).weight, theirs.get_submodule(path).weight, RELATIVE)
    assert ml.merge_report(model).total.error["float32"] < 1e-4


def test_a_tied_embedding_alone_equals_pefts(tmp_path):
    model = adapted("tied", ["embed_tokens"], tie="untie")
    ml.save_adapter(model, tmp_path)
    close(output(in_peft("tied", tmp_path)), output(model), RELATIVE)
    close(output(ml.merge(model)), output(model), RELATIVE)


# ---- property


@kinds
def test_a_new_adapter_changes_nothing_and_goes_without_a_trace(kind, targets):
    model, expected = build(kind), output(build(kind))
    state = copy.deepcopy(model.state_dict())
    ml.inject(model, ml.LoRAConfig(**fields(targets)))
    assert torch.equal(output(model), expected)
    shake(model)
    with ml.disable_adapters(model):
        assert torch.equal(output(model), expected)
    ml.eject(model)
    assert torch.equal(output(model), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", ["embed_tokens"]), ("images", ["flat", "long", "deep"])]
)
def test_in_16_bits_the_adapter_stays_in_fp32(kind, targets):
    model = adapted(kind, targets).bfloat16()
    for layer in lora_layers(model).values():
        parameters = dict(layer.adapters["default"].named_parameters())
        assert set(parameters) == {"lora_A", "lora_B", "lora_magnitude_vector"}
        assert {p.dtype for p in parameters.values()} == {torch.float32}
    path = list(lora_layers(model))[0]
    x = TOKENS if kind == "llama" else IMAGES.bfloat16()
    y = model.get_submodule(path)(x)
    assert y.dtype == torch.bfloat16
    # The base's output, two products and their sum are rounded by 2⁻⁹ each; merging rounds once.
    close(y.float(), ml.merge(model).get_submodule(path)(x).float(), 2**-6)


def test_an_input_without_a_batch_gives_the_same_output():
    model = adapted("images", ["flat"])
    x = torch.randn(3, 8, 8)
    close(model.flat(x), model.flat(x[None])[0], RELATIVE)


def test_lengths_have_no_weight_decay_and_embeddings_one_rate():
    model = adapted("images", ["flat", "words"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = TrainConfig(loraplus_lr_ratio=4.0, weight_decay=0.1)
    settings = {}
    for group in new_optimizer(model, trainable, config).param_groups:
        for parameter in group["params"]:
            settings[id(parameter)] = (group["lr_ratio"], group["weight_decay"])
    flat, words = model.flat.adapters["default"], model.words.adapters["default"]
    for adapter in (flat, words):
        assert settings[id(adapter.lora_magnitude_vector)] == (1.0, 0.0)
        assert settings[id(adapter.lora_A)] == (1.0, 0.1)
    assert settings[id(flat.lora_B)] == (4.0, 0.1)
    assert settings[id(words.lora_B)] == (1.0, 0.1)


def test_gaussian_initial_values_are_those_of_plain_lora():
    models = [build("images"), build("images")]
    given = {"r": 2, "target_modules": ["flat", "head"], "init_lora_weights": "gaussian"}
    for model, dora in zip(models, (False, True), strict=True):
        ml.inject(model, ml.LoRAConfig(**given, use_dora=dora), seed=3)
    for name in given["target_modules"]:
        plain, own = [model.get_submodule(name).adapters["default"] for model in models]
        assert torch.equal(own.lora_A, plain.lora_A)


# ---- error


def test_a_convolution_with_groups_is_refused():
    model = Images(groups=2)
    with pytest.raises(ValueError, match="long: use_dora: a convolution with 2 groups has no sum"):
        ml.inject(model, ml.LoRAConfig(**fields(["long"])))
    assert not lora_layers(model)


def test_one_update_for_all_places_of_a_tied_weight_is_refused():
    model = build("tied")
    with pytest.raises(ValueError, match='use_dora with tie="shared": .* tie="untie" adapts'):
        ml.inject(model, ml.LoRAConfig(**fields(["embed_tokens", "lm_head"], tie="shared")))
    with pytest.raises(ValueError, match="shares its weight"):
        ml.inject(model, ml.LoRAConfig(**fields(["embed_tokens"])))
    assert not lora_layers(model)
