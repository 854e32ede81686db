"""Tests of the rounding of a merged weight to the 4-bit codes of its base.

Stochastic rounding stores one of the two neighbouring levels, is right on average, keeps the scales
and depends on the seed and the name of the layer only. Nearest rounding is as it was.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.toy import llama
from minilora.lora.config import LoRAConfig
from minilora.lora.inject import _layer_seed, inject
from minilora.lora.merging import four_bits
from minilora.lora.merging.four_bits import draw_codes, update
from minilora.lora.merging.merge import merge, merged_weight
from minilora.lora.registry import lora_layers
from minilora.models import save
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model
from minilora_kernels import NF4Weight, dequantize_nf4, nf4_codebook, quantize_nf4
from minilora_kernels.nf4.reference import unpack

LEVELS = nf4_codebook().double()
WIDEST = LEVELS.diff().max().item()


def four_bit(shape: tuple[int, int], double_quant: bool = True, blocksize: int = 64) -> NF4Weight:
    torch.manual_seed(0)
    return quantize_nf4(0.02 * torch.randn(shape), blocksize, double_quant)


def codes_of(weight: NF4Weight) -> Tensor:
    return unpack(weight.packed)[: weight.numel].long()


def scales_of(weight: NF4Weight) -> Tensor:
    return weight.absmax.repeat_interleave(weight.blocksize)[: weight.numel].double()


def merged_in_units(weight: NF4Weight, delta: Tensor) -> Tensor:
    """Return x = level[c] + ΔW / absmax in fp64."""
    return LEVELS[codes_of(weight)] + delta.flatten().double() / scales_of(weight)


def quantized_model(size: float = 1e-3, **config) -> nn.Module:
    model = llama(hidden_size=64)
    quantize_model(model)
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"]} | config
    inject(model, LoRAConfig(**options))
    for path, layer in lora_layers(model).items():
        torch.manual_seed(len(path))
        nn.init.normal_(layer.adapters["default"].lora_B, std=size)
    return model


def codes_by_layer(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            found[path] = module.packed.clone()
    return found


# ---- oracle


def test_stochastic_rounding_is_right_on_average():
    """Hoeffding: a mean of S draws in units of the gap is further than t from P at most with
    probability 2 exp(−2 S t²), here for any of n values with 1e-9."""
    weight = four_bit((32, 64))
    delta = 0.003 * torch.randn(32, 64)
    x = merged_in_units(weight, delta).clamp(-1, 1)
    draws = 400
    total = torch.zeros(weight.numel, dtype=torch.float64)
    for seed in range(draws):
        total += LEVELS[codes_of(draw_codes(weight, delta, "layer", seed).weight)]
    upper = torch.bucketize(x, LEVELS).clamp(1, 15)
    gap = LEVELS[upper] - LEVELS[upper - 1]
    t = math.sqrt(math.log(2 * weight.numel / 1e-9) / (2 * draws))
    rounding = 2**-22  # of x and of the draws, in fp32
    assert ((total / draws - x).abs() <= t * gap + rounding).all()
    assert (total / draws - LEVELS[codes_of(weight)]).abs().max() > t * WIDEST  # ΔW has an effect


def test_sum_over_inputs_has_the_variance_of_the_formula():
    """Σ a (x̂ − x) has the variance Σ a² (x − lo)(hi − x): within 6 standard deviations of zero."""
    weight = four_bit((256, 256))
    delta = 2e-4 * torch.randn(256, 256)
    x = merged_in_units(weight, delta)
    inside = x.abs() <= 1
    upper = torch.bucketize(x, LEVELS).clamp(1, 15)
    variance = ((x - LEVELS[upper - 1]) * (LEVELS[upper] - x)).clamp(min=0)
    drawn = LEVELS[codes_of(draw_codes(weight, delta, "layer", 0).weight)]
    a = delta.flatten().double()
    error = ((drawn - x) * a)[inside].sum().abs()
    deviation = (variance * a.square())[inside].sum().sqrt()
    assert error <= 6 * deviation
    measured = (drawn - x).square()[inside].mean()
    assert measured == pytest.approx(variance[inside].mean().item(), rel=0.1)
    # the bound of the docstring
    assert (variance <= delta.flatten().double().abs() / scales_of(weight) * WIDEST + 1e-7)[
        inside
    ].all()


def test_nearest_rounding_quantises_the_merged_weight_as_before():
    model = quantized_model(0.1)
    merged = merge(model, "nf4", rounding="nearest")
    for path, layer in lora_layers(model).items():
        expected = quantize_nf4(merged_weight(layer))
        stored = merged.get_submodule(path).weight
        assert torch.equal(stored.packed, expected.packed)
        assert torch.equal(stored.absmax_bytes, expected.absmax_bytes)


def test_nearest_rounding_returns_the_base_where_stochastic_keeps_the_update():
    """The update is 0.3 % of the weight, as that of a trained adapter."""
    layer = nn.Sequential(NF4Linear(four_bit((512, 512), double_quant=False)))
    inject(layer, LoRAConfig(r=8, lora_alpha=8, target_modules=["0"]))
    adapter = lora_layers(layer)["0"].adapters["default"]
    torch.manual_seed(0)
    nn.init.normal_(adapter.lora_B)
    W = layer[0].base_layer.dequantize(torch.float32)
    with torch.no_grad():
        adapter.lora_B *= 0.003 * W.norm() / (adapter.lora_B @ adapter.lora_A).norm()
    delta = update(lora_layers(layer)["0"]).double()

    def projection(**options) -> float:
        stored = merge(layer, "nf4", **options)[0].dequantize(torch.float32) - W
        return ((stored.double() * delta).sum() / delta.square().sum()).item()

    assert abs(projection(rounding="nearest")) < 0.1
    for seed in range(3):
        assert 0.9 < projection(seed=seed) < 1.1


# ---- property


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    size=st.sampled_from([0.0, 1e-6, 1e-3, 0.02, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_a_neighbour_and_scales_are_the_same(
    rows, columns, blocksize, double_quant, size, seed
):
    """No level lies between x and the stored level."""
    weight = four_bit((rows, columns), double_quant, blocksize)
    generator = torch.Generator().manual_seed(seed)
    delta = size * torch.randn(rows, columns, generator=generator)
    drawn = draw_codes(weight, delta, "layer", seed).weight
    for part in ("absmax_bytes", "nested_bytes", "offset_bytes"):
        assert getattr(drawn, part) is getattr(weight, part)
    stored = LEVELS[codes_of(drawn)]
    live = scales_of(weight).abs() > 1e-30
    x = merged_in_units(weight, delta).clamp(-1, 1)
    low = torch.minimum(stored, x) + 1e-6
    high = torch.maximum(stored, x) - 1e-6
    between = (LEVELS > low[:, None]) & (LEVELS < high[:, None])  # (n, 16)
    assert not between[live].any()
    if size == 0:
        assert torch.equal(drawn.packed, weight.packed)
    if weight.numel % 2:
        assert drawn.packed[-1] & 15 == 7  # the padding


def test_draws_depend_on_seed_and_name_only():
    weight = four_bit((64, 128))
    delta = 1e-3 * torch.randn(64, 128)

    def packed(name: str, seed: int) -> Tensor:
        return draw_codes(weight, delta, name, seed).weight.packed

    torch.manual_seed(1)
    first = packed("a", 0)
    state = torch.get_rng_state()
    assert torch.equal(first, packed("a", 0)) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, packed("a", 1)) and not torch.equal(first, packed("b", 0))
    # other draws than those of A, on which ΔW depends
    assert four_bits._draw_seed(0, "a") != _layer_seed(0, "a")


@pytest.mark.parametrize("chunk", [4096, 8192])
def test_codes_do_not_depend_on_the_size_of_a_chunk(monkeypatch, chunk):
    weight = four_bit((100, 131))
    delta = 1e-3 * torch.randn(100, 131)
    expected = draw_codes(weight, delta, "a", 0)
    monkeypatch.setattr(four_bits, "CHUNK", chunk)
    found = draw_codes(weight, delta, "a", 0)
    assert torch.equal(found.weight.packed, expected.weight.packed)
    assert found.lost == pytest.approx(expected.lost)


def test_codes_do_not_depend_on_order_or_threads():
    model = quantized_model()
    expected = codes_by_layer(merge(model, "nf4"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = codes_by_layer(merge(model, "nf4"))
    finally:
        torch.set_num_threads(threads)
    only_up = quantized_model(target_modules=["up_proj"])
    alone = codes_by_layer(merge(only_up, "nf4"))
    other = codes_by_layer(merge(model, "nf4", seed=1))
    for path, codes in expected.items():
        assert torch.equal(codes, again[path])
        assert path not in lora_layers(model) or not torch.equal(codes, other[path])
        if path.endswith("up_proj"):
            assert torch.equal(codes, alone[path])


def test_merge_and_save_write_equal_tensors_and_change_nothing(tmp_path):
    from minilora.models.loader import load_model

    model = quantized_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merge(model, "nf4", seed=5)
    save.save_model(
        model, tmp_path / "out", format="bnb-4bit", merge=True, requantize="stochastic", seed=5
    )
    read = load_model(tmp_path / "out", dtype="float32").state_dict()
    for key, value in merged.state_dict().items():
        assert torch.equal(value, read[key]), key
    for parameter in merged.parameters():
        parameter.data.zero_()  # a change of the copy
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_save_draws_a_layer_when_the_file_reaches_it(monkeypatch):
    """No second copy of the 4-bit layers is in memory."""
    drawn = []
    real = save.four_bit_weight

    def counted(layer, path, rounding, seed):
        drawn.append(path)
        return real(layer, path, rounding, seed)

    monkeypatch.setattr(save, "four_bit_weight", counted)
    model = quantized_model()
    entries = save._all_entries(model, model.config, None, save._Storage("bnb-4bit"))
    assert not drawn
    for entry in entries:
        assert entry.make().numel() == math.prod(entry.shape)
    assert sorted(drawn) == sorted(lora_layers(model))


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_alpha": -8}, {"use_rslora": True}])
def test_other_adapters_are_right_on_average(config):
    alpha = config.pop("lora_alpha", None)
    model = quantized_model(0.01, **config)
    if alpha is not None:  # as add_weighted_adapter makes it: a task vector is subtracted
        for layer in lora_layers(model).values():
            layer.adapters["default"].scaling *= -1
    path = "model.layers.0.mlp.up_proj"
    layer = lora_layers(model)[path]
    W = layer.base_layer.dequantize(torch.float32)
    delta = (merged_weight(layer) - W).double()
    assert delta.norm() > 1e-3 * W.norm()
    change = 0
    for seed in range(30):
        change = change + merge(model, "nf4", seed=seed).get_submodule(path).dequantize() - W
    projection = (change.double() / 30 * delta).sum() / delta.square().sum()
    assert 0.85 < projection < 1.1  # a part of DoRA's update lengthens values at the levels ±1


def test_original_is_quantised_with_the_update():
    original = llama(hidden_size=64)
    model = quantized_model(0.05)
    dense = dict(original.named_modules())
    merged = merge(model, "nf4", original=original)
    for path, layer in lora_layers(model).items():
        expected = quantize_nf4(dense[path].weight.detach() + update(layer))
        assert torch.equal(merged.get_submodule(path).weight.packed, expected.packed)
    with pytest.raises(ValueError, match="expected storage='nf4' with it, got None"):
        merge(model, original=original)
    with pytest.raises(ValueError, match="original: expected a dense weight of shape"):
        merge(model, "nf4", original=nn.Sequential(nn.Linear(2, 2)))


# ---- error


def test_block_with_a_zero_scale_stays_zero_and_is_refused_if_it_holds_the_update():
    W = 0.02 * torch.randn(4, 64)
    W[1] = 0
    weight = quantize_nf4(W, 64, double_quant=False)
    delta = 1e-3 * torch.randn(4, 64)
    drawn = draw_codes(weight, delta, "a", 0)
    assert not dequantize_nf4(drawn.weight)[1].any() and 0.2 < drawn.lost < 0.4

    layer = nn.Sequential(NF4Linear(weight))
    inject(layer, LoRAConfig(r=1, target_modules=["0"]))
    with torch.no_grad():
        lora_layers(layer)["0"].adapters["default"].lora_B[1] = 1.0
    with pytest.raises(ValueError, match=r"0: 100% of the update.* rounding='nearest'"):
        merge(layer, "nf4")
    stored = merge(layer, "nf4", rounding="nearest")[0].dequantize()
    assert stored[1].any()


def test_values_beyond_the_levels_take_the_outermost_level():
    weight = four_bit((8, 64), double_quant=False)
    outward = LEVELS[codes_of(weight)].sign().float().view(8, 64)
    drawn = draw_codes(weight, 10 * outward, "a", 0)
    assert set(codes_of(drawn.weight).tolist()) <= {0, 7, 15} and drawn.lost > 0.5
    slight = draw_codes(weight, 1e-4 * outward, "a", 0)
    edge = LEVELS[codes_of(weight)].abs() == 1
    assert torch.equal(codes_of(slight.weight)[edge], codes_of(weight)[edge])
    assert 0 < slight.lost < 0.1


def test_wrong_roundings_and_damaged_updates_raise(tmp_path):
    model = quantized_model()
    with pytest.raises(ValueError, match="rounding: expected one of stochastic, nearest, got 'up'"):
        merge(model, "nf4", rounding="up")
    with pytest.raises(ValueError, match="rounding: expected one of stochastic, nearest, got 'up'"):
        save.save_model(model, tmp_path, format="bnb-4bit", merge=True, requantize="up")
    lora_layers(model)["model.layers.0.mlp.up_proj"].adapters["default"].lora_B.data[0, 0] = (
        torch.nan
    )
    with pytest.raises(ValueError, match=r"up_proj: the update of the weight is not finite"):
        merge(model, "nf4")


def test_negative_scales_of_double_quantisation_are_kept():
    """A nested scale may decode to a small negative number; levels and sign belong together."""
    weight = four_bit((2, 64))
    offset = torch.tensor([-2.0]).view(torch.uint8)
    negative = replace(weight, offset_bytes=offset)
    assert (negative.absmax < 0).all()
    delta = 0.1 * torch.randn(2, 64)
    W = dequantize_nf4(negative, torch.float32)
    total = 0
    for seed in range(200):
        total = total + dequantize_nf4(draw_codes(negative, delta, "a", seed).weight) - W
    projection = (total / 200 * delta).sum() / delta.square().sum()
    assert 0.8 < projection < 1.1
