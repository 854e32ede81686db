"""Tests of DoRA, PiSSA and LoftQ against their papers and PEFT.

Files are exchanged in both directions; logits and the losses of 20 steps agree. Oracles: PEFT,
norms of W + s B A in fp64, and bitsandbytes' NF4. test_variants_used.py tests operations on them,
and test_matrix.py tests DoRA in every family and format.
"""

import copy
import json
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from torch import Tensor, nn

import minilora as ml
from helpers.kinds import build, output, shake
from helpers.tiny import oracle, twin
from helpers.toy import Letters, rows
from minilora.data import encode_dataset
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE
from minilora.lora.registry import lora_layers
from minilora.lora.variants.dora import EPSILON
from tests.training.test_train_vs_peft import STEPS, train_theirs

SOME = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
DORA = SOME | {"use_dora": True}
PISSA = SOME | {"init_lora_weights": "pissa"}
QUICK = SOME | {"init_lora_weights": "pissa_niter_4"}
LOFTQ = SOME | {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}}
VARIANTS = {"dora": DORA, "pissa": PISSA, "pissa, 4 iterations": QUICK, "loftq": LOFTQ}
RESIDUAL = pytest.mark.filterwarnings("ignore:LoftQ replaces the targeted layers")
pytestmark = RESIDUAL
KEEPS_W = pytest.mark.parametrize(
    "given", [DORA, PISSA, QUICK], ids=["dora", "pissa", "pissa, 4 iterations"]
)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Skip fsync and PEFT's model card, which these tests do not need."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


def small(**fields) -> nn.Module:
    return oracle(num_hidden_layers=2, **fields)


def injected(given: dict, model: nn.Module | None = None) -> nn.Module:
    model = twin(small()) if model is None else model
    ml.inject(model, ml.LoRAConfig(**given))
    return model


def close(a: nn.Module, b: nn.Module) -> None:
    """Assert that outputs are equal up to rounding.

    Logits are around 4: fp32 sums in another order, through two layers (6e-8 · 4 each).
    """
    torch.testing.assert_close(output(a), output(b), rtol=0, atol=3e-5)


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer.adapters["default"] for path, layer in lora_layers(model).items()}


def theirs(given: dict, model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given)).eval()


# ---- oracle: PEFT's files and logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@KEEPS_W
def test_our_file_in_peft(kind, given, tmp_path):
    base = build(kind)
    given = given | {"target_modules": ["c_attn"]} if kind == "gpt2" else given
    model = shake(injected(given, copy.deepcopy(base)))
    assert (output(model) - output(base)).abs().max() > 0.1
    ml.save_adapter(model, tmp_path / "ours")
    close(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval(), model)
    again = copy.deepcopy(base)
    ml.load_adapter(again, tmp_path / "ours")
    close(again, model)
    ml.save_adapter(again, tmp_path / "again")  # saved, loaded and saved: the same bytes
    assert (tmp_path / "ours" / WEIGHTS_FILE).read_bytes() == (
        tmp_path / "again" / WEIGHTS_FILE
    ).read_bytes()
    assert (tmp_path / "ours" / CONFIG_FILE).read_bytes() == (
        tmp_path / "again" / CONFIG_FILE
    ).read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pissa_files_of_peft_load_and_are_saved_as_converted(kind, rslora, tmp_path):
    """From PEFT's raw file, A₀ and B₀ are computed from W again, as PEFT does.

    Our file equals PEFT's converted file, bit for bit, patterns of α included.
    """
    targets = {"target_modules": ["c_attn" if kind == "gpt2" else "q_proj"], "use_rslora": rslora}
    # PEFT does not convert patterns together with rsLoRA.
    patterns = {} if rslora else {"rank_pattern": {r"0\..*": 3}, "alpha_pattern": {r"1\..*": 5}}
    base, given = build(kind), PISSA | targets | patterns
    other = theirs(given, copy.deepcopy(base))
    # PEFT requires this value when the initial adapter is saved.
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(str(tmp_path / "start"))
    other.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(0)
    for name, p in other.named_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator) if "lora_" in name else 0
    expected = output(other)
    other.save_pretrained(str(tmp_path / "raw"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=tmp_path / "start"
        )
    for folder in ("raw", "converted"):
        model = copy.deepcopy(base)
        ml.load_adapter(model, tmp_path / folder)
        torch.testing.assert_close(output(model), expected, rtol=0, atol=3e-5)
        ml.save_adapter(model, tmp_path / "ours")
        found, there = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "converted"))
        assert found.keys() == there.keys() and all(
            torch.equal(found[key], there[key]) for key in found
        )
        values = [
            json.loads((tmp_path / name / CONFIG_FILE).read_text())
            for name in ("ours", "converted")
        ]
        for field in (
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "init_lora_weights",
        ):
            assert values[0][field] == values[1][field], field


def test_a_dora_file_of_peft_gives_its_output(tmp_path):
    other = theirs(DORA, small())
    shake(other).save_pretrained(str(tmp_path))
    model = twin(small())
    ml.load_adapter(model, tmp_path)
    close(model, other)
    assert any(
        key.endswith("q_proj.lora_magnitude_vector") for key in load_file(tmp_path / WEIGHTS_FILE)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_dora_with_dropout_equals_peft(bias, tmp_path):
    """The masks are equal: both libraries draw one per layer, in the same order."""
    given = DORA | {"lora_dropout": 0.4}
    model = shake(injected(given, twin(small(attention_bias=bias))))
    ml.save_adapter(model, tmp_path)
    other = PeftModel.from_pretrained(small(attention_bias=bias), str(tmp_path))
    dropped = []
    for one in (model.train(), other.train()):
        torch.manual_seed(0)
        dropped.append(output(one))
    torch.testing.assert_close(*dropped, rtol=0, atol=3e-5)
    assert (dropped[0] - output(model.eval())).abs().max() > 0.1


# ---- oracle: PEFT's training


def side_by_side(given: dict, folder) -> tuple[nn.Module, nn.Module]:
    """Return the variant in minilora and in PEFT, with the same A and B, before training."""
    base = small(vocab_size=len(Letters()), max_position_embeddings=64)
    ours = injected(given, twin(base))
    if given is PISSA:  # PEFT computes its own start from the same W
        other = theirs(given, base)
        for path, adapter in adapters(ours).items():
            A = other.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
            assert torch.equal(adapter.lora_A, A)
        return ours, other
    if given is LOFTQ:  # PEFT's needs CUDA: a plain LoRA on the same replaced base
        with ml.disable_adapters(ours), torch.no_grad():
            for path, layer in lora_layers(ours).items():
                base.get_submodule(path).weight.copy_(layer.base_layer.dequantize())
    ml.save_adapter(ours, folder)
    return ours, PeftModel.from_pretrained(base, str(folder), is_trainable=True)


@pytest.mark.parametrize("given", [DORA, PISSA, LOFTQ], ids=["dora", "pissa", "loftq"])
def test_losses_of_twenty_steps_equal_pefts(given, tmp_path):
    ours, other = side_by_side(given, tmp_path)
    config = ml.TrainConfig(
        max_steps=STEPS, learning_rate=2e-3, per_device_train_batch_size=3, weight_decay=0.0
    )
    data = rows(40)
    before = {key: tensor.clone() for key, tensor in ml.adapter_state_dict(ours).items()}
    expected = train_theirs(other, encode_dataset(data, Letters(), config.max_length), config)
    found = ml.train(ours, Letters(), data, config)
    assert found.losses == pytest.approx(expected, rel=1e-4)
    # The loss falls, so that the agreement is about training.
    assert expected[0] - expected[-1] > 0.05 * expected[0]
    moved = {
        key: (tensor - before[key]).abs().max()
        for key, tensor in ml.adapter_state_dict(ours).items()
    }
    assert all(distance > 1e-3 for distance in moved.values()), moved  # m moves, too
    assert any("magnitude" in key for key in moved) == bool(given.get("use_dora"))


# ---- oracle: the equations


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_norms_are_those_of_the_sum(quantised):
    linear = nn.Linear(48, 32)
    layer = ml.NF4Linear.from_linear(linear) if quantised else linear
    model = nn.Sequential(layer)
    ml.inject(model, ml.LoRAConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=True))
    adapter = shake(model)[0].adapters["default"]
    W = (layer.dequantize(torch.float64) if quantised else linear.weight.double()).detach()
    V = W + 7 / 3 * adapter.lora_B.double() @ adapter.lora_A.double()
    norms = V.norm(dim=1)
    # fp32: each of the three sums is rounded by 2⁻²⁴ per term and has at most 48 terms.
    torch.testing.assert_close(adapter.norms(layer).double(), norms, rtol=48 * 2**-24, atol=0)
    x = torch.randn(5, 48, dtype=torch.float64)
    expected = (
        x @ (adapter.lora_magnitude_vector.double()[:, None] * V / norms[:, None]).T
        + linear.bias.double()
    )
    torch.testing.assert_close(model(x.float()).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ml.merge(model)(x.float()).double(), expected, rtol=0, atol=1e-5)


def test_norms_of_rows_that_cancel():
    """W + s B A is a thousandth of W: the error is 2⁻²³ of the cancelled values, times the terms.

    This is the documented bound.
    """
    linear = nn.Linear(48, 32, bias=False)
    linear.weight.data = torch.randn(32, 2) @ torch.randn(2, 48)
    adapter = injected(
        {"r": 2, "lora_alpha": 2, "target_modules": ["0"], "use_dora": True}, nn.Sequential(linear)
    )[0]
    adapter = adapter.adapters["default"]
    U, S, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    adapter.lora_A.data, adapter.lora_B.data = Vh[:2].clone(), -0.999 * U[:, :2] * S[:2]
    W = linear.weight.detach().double()
    squares = (W + adapter.lora_B.double() @ adapter.lora_A.double()).norm(dim=1).square()
    bound = 48 * 2**-23 * (2 * W.norm(dim=1)).square()
    assert ((adapter.norms(linear).double().square() - squares).abs() <= bound).all()


def test_a_row_of_zeros_stays_finite_and_learns():
    linear = nn.Linear(16, 8, bias=False)
    linear.weight.data[3] = 0
    model = injected({"r": 2, "target_modules": ["0"], "use_dora": True}, nn.Sequential(linear))
    adapter = model[0].adapters["default"]
    assert adapter.lora_magnitude_vector[3] == EPSILON
    optimizer, x = torch.optim.Adam(adapter.parameters(), lr=0.05), torch.randn(64, 16)
    target = x @ torch.randn(16)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x)[:, 3] - target).square().mean()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(ml.merge(model)[0].weight).all()
    assert loss < 0.5 * target.square().mean()


def best(M: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return (U[:, :r] * S[:r] @ Vh[:r]).float()


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize(
    ("given", "most"), [(PISSA, 1e-4), (QUICK, 0.02)], ids=["exact", "4 iterations"]
)
def test_pissa_begins_as_the_principal_part(given, most, quantised):
    model = twin(small())
    if quantised:
        ml.quantize_model(model)
    injected(given, model)
    for path, layer in lora_layers(model).items():
        adapter = layer.adapters["default"]
        W = layer.base_layer.dequantize() if quantised else layer.weight.detach()
        error = (adapter.scaling * adapter.lora_B @ adapter.lora_A - best(W, 4)).norm() / best(
            W, 4
        ).norm()
        # Exact: the error is 2⁻²⁴ over the gap between σ₄ and σ₅, which is some hundredths of σ₁
        # for noise of 64 columns. In 4 iterations: the loss of σ² compared with the best is small,
        # although the spectrum of noise is flat.
        lost = (W - adapter.scaling * adapter.lora_B @ adapter.lora_A).norm() / (
            W - best(W, 4)
        ).norm() - 1
        assert (error if given is PISSA else lost) <= most, path


def test_loftq_is_algorithm_1_with_bitsandbytes_nf4():
    """The oracle combines PEFT's SVD and bitsandbytes' 4 bits as in the paper.

    PEFT's own LoftQ runs on CUDA only. α is r, because PEFT leaves s out.
    """
    torch.manual_seed(0)
    linear = nn.Linear(128, 64).bfloat16().float()
    W = res = linear.weight.detach().clone()
    for _ in range(3):
        Q = dequantize_4bit(*quantize_4bit(res, quant_type="nf4", compress_statistics=True))
        parts = _low_rank_decomposition(W - Q, reduced_rank=4)
        res = W - parts["L"] @ parts["R"]
    model = injected(LOFTQ | {"lora_alpha": 4, "target_modules": ["0"]}, nn.Sequential(linear))
    adapter = model[0].adapters["default"]
    # 8-bit scales may differ by one step of 256 (1.5e-3 each): bitsandbytes rounds them differently
    # on the CPU.
    assert (model[0].base_layer.dequantize() - Q).abs().max() <= 4e-3 * W.abs().max()
    found = model[0].base_layer.dequantize() + adapter.lora_B @ adapter.lora_A
    assert ((W - found).norm() / (W - Q - parts["L"] @ parts["R"]).norm() - 1).abs() < 0.01


def test_loftq_error_falls_with_iterations_and_ignores_alpha():
    torch.manual_seed(0)
    errors = {}
    for alpha, count in ((4, 1), (4, 5), (16, 5)):
        linear = nn.Linear(128, 96)
        linear.weight.data = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
        W, plain = linear.weight.detach().clone(), ml.NF4Linear.from_linear(linear).dequantize()
        given = {
            "r": 4,
            "lora_alpha": alpha,
            "target_modules": ["0"],
            "loftq_config": {"loftq_iter": count},
        }
        model = injected(given | {"init_lora_weights": "loftq"}, nn.Sequential(linear))
        adapter = model[0].adapters["default"]
        Q = model[0].base_layer.dequantize()
        errors[alpha, count] = (
            (W - Q - adapter.delta(torch.float32)).norm() / (W - plain).norm()
        ).item()
        # After the first iteration, another matrix is quantised.
        assert torch.equal(Q, plain) == (count == 1)
    assert errors[4, 5] < 0.99 * errors[4, 1] < 0.99
    assert errors[16, 5] == pytest.approx(errors[4, 5], rel=1e-3)
