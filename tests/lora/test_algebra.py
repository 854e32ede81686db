"""Tests of adapter arithmetic: linear combination, SVD, TIES and DARE.

Adapters add up as their ΔW do, for any ranks, scalings and layers. Oracles: ΔW in fp64, PEFT's TIES
on ΔW, and the Eckart–Young theorem. Property: one adapter with weight 1 stays the same, bit for
bit, as a value, in its folder and in its model. Two tests show faults of PEFT that minilora does
not have: its "linear" is inexact, and an rsLoRA comes out twice as strong.
"""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor, nn

import minilora as ml
from helpers.kinds import build, close, output, shake
from helpers.tiny import oracle, twin
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE

KINDS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
    },
    "patterns": {
        "r": 6,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {r"1\..*": 5},
        "target_modules": "all-linear",
    },
}
DORA = {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}
PISSA = {"r": 3, "init_lora_weights": "pissa", "target_modules": ["q_proj"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def model() -> nn.Module:
    return twin(oracle(num_hidden_layers=2))


def value(given: dict, seed: int = 0) -> ml.AdapterWeights:
    one = model()
    ml.inject(one, ml.LoRAConfig(**given), seed=seed)
    return ml.AdapterWeights.of(shake(one, seed))


def deltas(adapter: ml.AdapterWeights) -> dict[str, Tensor]:
    """Return ΔW in fp64 for each layer, computed from the file's own tensors."""
    found, prefix = {}, "base_model.model."
    config = ml.LoRAConfig.from_dict(adapter.values)
    for key, B in adapter.tensors.items():
        if key.endswith(".lora_B.weight"):
            path = key.removeprefix(prefix).removesuffix(".lora_B.weight")
            r, alpha = B.shape[1], config.strength(path)[1]
            s = alpha / r**0.5 if config.use_rslora else alpha / r
            found[path] = s * B.double() @ adapter.tensors[key.replace("lora_B", "lora_A")].double()
    return found


def weighted(adapters, weights) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for w, adapter in zip(weights, adapters, strict=True):
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + w * delta
    return total


def same_deltas(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 4e-7
) -> None:
    """Assert that ΔW are equal within a few fp32 roundings (6e-8 each).

    The roundings are those of s B, of w s B, and of each factor after an SVD.
    """
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        assert (found[path] - delta).norm() <= relative * delta.norm(), path


# ---- oracle


@pytest.mark.parametrize(("w", "v"), [(0.5, 0.5), (1, -1), (0.7, 0.3), (0.7, -0.3)])
def test_sums_are_exact_where_peft_s_linear_is_not(w, v):
    """For two random adapters of rank 4, "linear" loses most of ΔW, and concatenation is exact."""
    a, b = (value(KINDS["plain"], seed) for seed in (0, 1))
    expected = weighted([a, b], [w, v])
    same_deltas(deltas(w * a + v * b), expected)
    same_deltas(deltas(ml.combine_adapters([a, b], [w, v])), expected)
    assert ml.combine_adapters([a, b], [w, v]).error == 0
    if v < 0 < w < 1:
        return  # PEFT takes the root of each weight; other rows test a sign and a size alone
    theirs = get_peft_model(
        oracle(num_hidden_layers=2), LoraConfig(**KINDS["plain"]), adapter_name="a"
    )
    theirs.add_adapter("b", LoraConfig(**KINDS["plain"]))
    for name, adapter in (("a", a), ("b", b)):
        for key, tensor in adapter.tensors.items():
            theirs.get_parameter(key.replace(".weight", f".{name}.weight")).data.copy_(tensor)
    theirs.add_weighted_adapter(["a", "b"], [w, v], "sum", combination_type="linear")
    for path, delta in expected.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        assert 0.6 < (layer.get_delta_weight("sum").double() - delta).norm() / delta.norm() < 1.3, (
            path
        )


def test_other_ranks_strengths_and_layers_add_up_in_a_model():
    values = [value(given, seed) for seed, given in enumerate([*KINDS.values(), PISSA])]
    weights = [0.7, -0.3, 1.5, 0.25]
    total = ml.combine_adapters(values, weights)
    same_deltas(deltas(total), weighted(values, weights))
    one, other = model(), model()
    total.put(one)
    for number, (w, adapter) in enumerate(zip(weights, values, strict=True)):
        (w * adapter).put(other, f"part{number}")
    ml.set_adapter(other, ml.list_adapters(other))
    close(output(one), output(other), 1e-5)
    assert (output(one) - output(model())).abs().max() > 0.1


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_eckart_young_and_reports_its_error(rank):
    total = value(KINDS["plain"]) + value(KINDS["rslora"], 1)
    cut = total.truncate(rank)
    assert ml.combine_adapters([total], rank=rank).error == cut.error
    lost = whole = 0.0
    for path, delta in deltas(total).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        found = deltas(cut)[path]
        assert (found - U[:, :rank] * S[:rank] @ Vh[:rank]).norm() <= 1e-6 * delta.norm()
        error = (found - delta).norm()
        assert cut.errors[path] == pytest.approx((error / delta.norm()).item(), rel=1e-6)
        lost, whole = lost + error.item() ** 2, whole + delta.norm().item() ** 2
    assert cut.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6) and 0.1 < cut.error < 1
    assert total.truncate(8) is total


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3], [1.0, -0.5]])
def test_ties_on_delta_w_equals_peft(weights):
    a, b = value(KINDS["plain"]), value(KINDS["patterns"], 1)
    # The full rank: nothing is lost.
    found = ml.combine_adapters([a, b], weights, "ties", density=0.3, rank=64)
    smallest = min(min(delta.shape) for delta in deltas(found).values())
    # The error of an SVD in fp32 is p(n)·u of the norm, with p(n) below n for n singular values.
    assert found.error < smallest * 2**-24
    first, second = deltas(a), deltas(b)
    for path, delta in deltas(found).items():
        parts = [part.get(path, torch.zeros_like(delta)).float() for part in (first, second)]
        expected = peft_ties(parts, torch.tensor(weights), 0.3).double()
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    cut = ml.combine_adapters([a, b], weights, "ties", density=0.3, rank=4)
    off = [(deltas(cut)[path] - delta).norm() ** 2 for path, delta in deltas(found).items()]
    whole = sum(delta.norm() ** 2 for delta in deltas(found).values())
    assert cut.error == pytest.approx((sum(off) / whole).sqrt().item(), rel=1e-4)


def test_dare_drops_and_scales_entries_of_delta_w():
    a, density = value(KINDS["plain"]), 0.25
    found = ml.combine_adapters([a], [2.0], "dare", density=density, rank=64)
    for path, delta in deltas(a).items():
        there = deltas(found)[path]
        kept = there.abs() > 1e-5 * delta.abs().max()
        assert (
            abs(kept.double().mean() - density)
            < 4 * (density * (1 - density) / delta.numel()) ** 0.5
        )  # 4 sigma
        torch.testing.assert_close(
            there[kept], 2 / density * delta[kept], rtol=0, atol=1e-5 * there.abs().max().item()
        )
    again, other = (
        ml.combine_adapters([a], [2.0], "dare", density=density, rank=64, seed=seed)
        for seed in (0, 1)
    )
    first, second, third = (next(iter(made.tensors.values())) for made in (found, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


# ---- property


@pytest.mark.parametrize("given", [*KINDS.values(), DORA, PISSA], ids=[*KINDS, "dora", "pissa"])
def test_one_adapter_with_weight_1_is_itself(given, tmp_path):
    """PEFT returns an rsLoRA twice as strong, and a different DoRA."""
    one = model()
    ml.inject(one, ml.LoRAConfig(**given))
    expected = output(shake(one))
    ml.save_adapter(one, tmp_path / "saved")
    for number, made in enumerate(
        (
            1.0 * ml.AdapterWeights.of(one),
            ml.combine_adapters([ml.AdapterWeights.load(tmp_path / "saved")], [1]),
        )
    ):
        made.save(tmp_path / f"{number}")
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            assert (tmp_path / f"{number}" / file).read_bytes() == (
                tmp_path / "saved" / file
            ).read_bytes()
        again = model()
        made.put(again)
        if given is not PISSA:  # PiSSA is saved as a plain LoRA
            assert torch.equal(output(again), expected)
        close(output(again), expected, 1e-5)


def test_peft_s_rslora_comes_out_twice_as_strong():
    theirs = get_peft_model(
        oracle(num_hidden_layers=2), LoraConfig(**KINDS["rslora"]), adapter_name="a"
    )
    theirs.add_weighted_adapter([*shake(theirs).peft_config], [1.0], "sum", combination_type="svd")
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    ratio = layer.get_delta_weight("sum").norm() / layer.get_delta_weight("a").norm()
    assert ratio.item() == pytest.approx(2, rel=1e-4)


def test_a_sum_is_saved_as_a_peft_file_with_its_base(tmp_path):
    from peft import PeftModel

    total = 0.5 * value(KINDS["plain"]) + value(KINDS["patterns"], 1)
    total.save(tmp_path / "sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(
            oracle(num_hidden_layers=2), str(tmp_path / "sum")
        ).eval()
    one = model()
    ml.load_adapter(one, tmp_path / "sum")
    close(output(theirs), output(one), 1e-5)
    with pytest.raises(ValueError, match="trained on another base"):
        total.put(twin(oracle(num_hidden_layers=2, seed=1)))
    assert json.loads((tmp_path / "sum" / CONFIG_FILE).read_text())["r"] == 10


def test_adapters_of_conv1d_layers_add_up():
    one = build("gpt2")
    ml.inject(one, ml.LoRAConfig(r=2, target_modules=["c_attn"]))
    shake(one)
    twice = build("gpt2")
    (0.5 * ml.AdapterWeights.of(one) + 0.5 * ml.AdapterWeights.of(one)).put(twice)
    close(output(twice), output(one), 1e-5)


# ---- error


def test_adding_incompatible_adapters_raises():
    a, dora = value(KINDS["plain"]), value(DORA)
    for bad in (
        lambda: 2 * dora,
        lambda: a + dora,
        lambda: dora.truncate(2),
        lambda: ml.combine_adapters([dora, a]),
    ):
        with pytest.raises(ValueError, match="DoRA rescales W, so its change of W depends on W"):
            bad()
    for given in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ):
        with pytest.raises(ValueError, match="only adapters of linear layers"):
            2 * value({"r": 2} | given)
    with pytest.raises(ValueError, match="finite"):
        float("nan") * a
    with pytest.raises(TypeError):
        a + 1  # pyright: ignore[reportOperatorIssue] the wrong type is the test
    other = twin(oracle(num_hidden_layers=2, seed=1))
    ml.inject(other, ml.LoRAConfig(**KINDS["plain"]))
    with pytest.raises(ValueError, match="trained on different bases: model.layers"):
        a + ml.AdapterWeights.of(shake(other))
    wide = twin(oracle(num_hidden_layers=2, hidden_size=32))
    ml.inject(wide, ml.LoRAConfig(**KINDS["plain"]))
    with pytest.raises(
        ValueError,
        match=r"0.self_attn.q_proj is \(64, 64\) in one adapter, \(32, 32\) in the other",
    ):
        a + ml.AdapterWeights.of(shake(wide))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "expected adapters"),
        (2, {"weights": [1.0]}, "as many weights"),
        (2, {"method": "tiez"}, "a method of linear, svd, ties, dare"),
        (2, {"method": "ties", "rank": 2}, "density: expected 0 < density <= 1"),
        (2, {"method": "dare", "rank": 2, "density": 0}, "density: expected"),
        (2, {"density": 0.5}, "expected none for linear"),
        (2, {"method": "ties", "density": 0.5}, "rank: ties leaves no low rank"),
        (1, {"rank": 0}, "rank: expected 1 or more"),
        (2, {"rank": 0}, "rank: expected 1 or more"),
        (2, {"method": "svd", "rank": 0}, "rank: expected 1 or more"),
        (2, {"method": "dare", "density": 0.5, "rank": -1}, "rank: expected 1 or more"),
    ],
)
def test_combine_adapters_with_invalid_options_raises(count, options, message):
    with pytest.raises(ValueError, match=message):
        ml.combine_adapters([value(KINDS["plain"])] * count, **options)


def test_a_value_prints_on_one_line():
    one = ml.AdapterWeights({"r": 4}, {"a": torch.zeros(2, 3), "b": torch.ones(1)}, error=0.125)
    assert repr(one) == "AdapterWeights(r=4, 2 tensors, error=0.125)"
