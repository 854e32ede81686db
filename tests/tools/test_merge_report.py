"""Proves that the merge report measures the effect of a merge.

Its figures are those of the weights that `merge` makes. On random matrices they equal the known
figures of 16-bit and NF4 targets. The verdict follows the measured losses, or the projection without
them. The first stage that differs is the one that was changed.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import tiny
from helpers.toy import Letters, llama, lora, rows
from minilora.evaluation.evaluate import evaluate
from minilora.lora.active import disable_adapters
from minilora.lora.config import LoRAConfig
from minilora.lora.inject import inject
from minilora.lora.merging.merge import merge
from minilora.lora.registry import lora_layers
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model
from minilora.tools.merge_report import (
    SHOWN,
    LayerReport,
    MergeReport,
    first_difference,
    merge_report,
)
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from tests.lora.test_merge import TOKENS, model_with_adapter

WIDTH, RANK = 512, 8
# ‖ΔW‖/‖W‖ -> error in bf16 on the dequantised base, on the original bf16 base, and in NF4 again by
# nearest rounding; cosine in NF4 again.
KNOWN = {
    0.003: (0.479, 30.7, 1.15, 0.01),
    0.01: (0.165, 9.2, 1.13, 0.03),
    0.03: (0.055, 3.07, 1.08, 0.08),
    0.1: (0.017, 0.92, 0.78, 0.74),
    0.3: (0.006, 0.31, 0.32, 0.95),
}


def layer_with(size: float, quantize: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return a bf16 layer with a Gaussian adapter of ‖ΔW‖ = size · ‖W‖, and the layer without it.

    The weights are N(0, 0.02²).
    """
    original = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).bfloat16()
    nn.init.normal_(original[0].weight, std=0.02)
    model = copy.deepcopy(original)
    if quantize:
        model[0] = NF4Linear.from_linear(model[0], 64, double_quant=False)
    inject(model, LoRAConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    adapter = lora_layers(model)["0"].adapters["default"]
    nn.init.normal_(adapter.lora_A)
    nn.init.normal_(adapter.lora_B)
    with torch.no_grad():
        adapter.lora_B *= (
            size * original[0].weight.float().norm() / (adapter.lora_B @ adapter.lora_A).norm()
        )
    return model, original


# ---- oracle


@pytest.mark.parametrize("size", KNOWN)
def test_known_figures_of_merging_are_measured(size):
    model, original = layer_with(size)
    total = merge_report(model, original, rounding="nearest").total
    bf16, onto_original, nf4, cosine = KNOWN[size]
    assert total.size == pytest.approx(size, rel=0.01)
    # another draw of W from the same distribution
    assert total.error["bfloat16"] == pytest.approx(bf16, rel=0.1)
    assert total.error["original"] == pytest.approx(onto_original, rel=0.1)
    assert total.error["nf4"] == pytest.approx(nf4, rel=0.1)
    assert total.cosine["nf4"] == pytest.approx(cosine, abs=0.05)
    onto, W = copy.deepcopy(model), model[0].base_layer.dequantize(torch.float32).double()
    onto[0].base_layer = original[0]
    adapter = model[0].adapters["default"]
    delta = adapter.lora_B.double() @ adapter.lora_A.double()
    error = (merge(onto)[0].weight.double() - W - delta).norm() / delta.norm()
    assert total.error["original"] == pytest.approx(error.item(), rel=1e-9)
    # the error is orthogonal to ΔW: cos = 1 / sqrt(1 + error²)
    assert total.cosine["bfloat16"] == pytest.approx(
        (1 + total.error["bfloat16"] ** 2) ** -0.5, abs=0.01
    )
    assert total.error["float32"] < 1e-4 and total.cosine["float32"] > 0.9999
    for target in ("float32", "bfloat16"):
        assert total.projection[target] == pytest.approx(1, abs=0.02)
    # W₁₆ is exactly on the levels of bf16, so that bf16 rounds a part of a small update away
    assert total.projection["original"] == pytest.approx(1, abs=0.1 if size < 0.01 else 0.02)
    if size < 0.03:
        assert abs(total.projection["nf4"]) < 0.2
    # the quantised original and stochastic rounding keep the update where nearest rounding does not
    assert 0.9 < total.projection["original-nf4"] < 1.1
    drawn = merge_report(model).total
    assert 0.9 < drawn.projection["nf4"] < 1.1
    if size < 0.01:
        assert drawn.cosine["nf4"] < 0.2  # the noise is longer than the update


@torch.no_grad()
def test_bf16_loses_a_part_of_a_small_adapter_that_fp32_keeps():
    """The adapter changes the logits by 1 to 2 %.

    Of this change fp32 loses nothing, fp16 some per cent and bf16 tens of per cent.
    """
    # weights that bf16 holds exactly, as those of a checkpoint
    model = lora(llama(hidden_size=64).bfloat16().float())
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].lora_B, std=1.5e-3)
    tokens = torch.arange(64)[None]
    trained = model(tokens)
    with disable_adapters(model):
        effect = (trained - model(tokens)).norm() / trained.norm()
    lost = {}
    for storage in ("float32", "float16", "bfloat16"):
        merged = merge(model, storage).float()  # rounds the weights and computes in fp32
        lost[storage] = (merged(tokens) - trained).norm() / trained.norm() / effect
    assert 0.005 < effect < 0.03
    assert lost["float32"] < 1e-3 and lost["float16"] < 0.1 and 0.15 < lost["bfloat16"] < 1


def test_pefts_unmerge_in_bf16_does_not_undo_its_merge():
    """minilora has no unmerge, because the base cannot regain the bits that rounding removed."""
    from peft import LoraConfig, get_peft_model

    base = tiny.oracle().bfloat16()
    before = {name: p.clone() for name, p in base.named_parameters()}
    peft = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    peft.merge_adapter()
    peft.unmerge_adapter()
    after = {
        name.replace(".base_layer", ""): p
        for name, p in base.named_parameters()
        if "lora_" not in name
    }
    linears = [name for name in before if "_proj" in name]
    changed = sum((before[name] != after[name]).sum().item() for name in linears)
    assert changed > 0.1 * sum(before[name].numel() for name in linears)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "nf4"])
def test_the_figures_are_those_of_the_merged_model(storage):
    model = model_with_adapter(quantize=True)
    merged, report = merge(model, storage), merge_report(model)
    for layer in report.layers[:3]:
        adapted = model.get_submodule(layer.name)
        delta = sum(
            a.scaling * a.lora_B.double() @ a.lora_A.double() for a in adapted.adapters.values()
        )
        W, made = (
            adapted.base_layer.dequantize(torch.float32).double(),
            merged.get_submodule(layer.name),
        )
        M = made.dequantize(torch.float32).double() if storage == "nf4" else made.weight.double()
        assert layer.size == pytest.approx((delta.norm() / W.norm()).item())
        assert layer.error[storage] == pytest.approx(
            ((M - W - delta).norm() / delta.norm()).item(), abs=1e-12
        )
        cosine = nn.functional.cosine_similarity((M - W).flatten(), delta.flatten(), dim=0)
        assert layer.cosine[storage] == pytest.approx(cosine.item())
        projection = ((M - W) * delta).sum() / delta.square().sum()
        assert layer.projection[storage] == pytest.approx(projection.item())


# ---- property


def test_the_total_is_all_layers_as_one_vector():
    model = model_with_adapter(quantize=True)
    report = merge_report(model)
    squares = [
        sum((a.scaling * a.lora_B @ a.lora_A) for a in layer.adapters.values())
        .norm()
        .square()
        .item()
        for layer in lora_layers(model).values()
    ]
    by_name = dict(zip(lora_layers(model), squares, strict=True))
    mean = sum(layer.error["nf4"] ** 2 * by_name[layer.name] for layer in report.layers) / sum(
        squares
    )
    assert report.total.error["nf4"] == pytest.approx(mean**0.5, rel=1e-5)


def test_the_report_changes_nothing_and_sorts_worst_first():
    model = model_with_adapter(quantize=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = merge_report(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    worst = [max(layer.error.values()) for layer in report.layers]
    assert worst == sorted(worst, reverse=True) and len(worst) == 14
    printed = str(replace(report, losses={"base": 3.5, "trained": 1.5, "nf4": 2.25}))
    assert printed.count("layers.") == SHOWN and "4 layers with a smaller error" in printed
    assert report.layers[0].name in printed and "2.2500" in printed
    assert (
        "recovery 0.6250   +0.7500 nats" in printed
        and "0.6250"
        in replace(report, losses={"base": 3.5, "trained": 1.5, "nf4": 2.25})._repr_html_()
    )


def test_a_dense_base_has_no_nf4_target_and_idle_layers_no_line():
    model, _ = layer_with(0.1, quantize=False)
    assert "nf4" not in merge_report(model).total.error
    model = lora()
    nn.init.normal_(model.model.layers[0].mlp.up_proj.adapters["default"].lora_B)
    assert [layer.name for layer in merge_report(model).layers] == ["model.layers.0.mlp.up_proj"]


def test_merging_into_nf4_keeps_every_other_layer_and_the_kind():
    model = llama()
    quantize_model(model, blocksize=32, double_quant=False)
    inject(model, LoRAConfig(target_modules=["up_proj"]))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].lora_B, std=0.1)
    merged = merge(model, "nf4")
    for name, module in merged.named_modules():
        if isinstance(module, NF4Linear):
            base = model.get_submodule(name)
            assert module.blocksize == 32 and not module.weight.double_quant
            assert name.endswith("up_proj") or torch.equal(module.packed, base.packed)
    assert sum(isinstance(module, NF4Linear) for module in merged.modules()) == 14


def test_the_first_stage_that_differs_is_named():
    model = llama()
    other = copy.deepcopy(model)
    assert first_difference(model, other, TOKENS) is None
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert first_difference(model, other, TOKENS) == "model.layers.1.mlp.up_proj"
    assert not any(module._forward_hooks for module in model.modules())


# ---- conclusions


def report_with(losses: dict[str, float], nf4: float = 0.98) -> MergeReport:
    """Return a report of some targets with these losses and this projection in 4 bits."""
    error = {"float32": 1e-6, "bfloat16": 0.4, "nf4": 8.0, "original": 30.0, "original-nf4": 9.0}
    cosine = {"float32": 1.0, "bfloat16": 0.9, "nf4": 0.12, "original": 1.0, "original-nf4": 0.1}
    projection = dict.fromkeys(error, 1.0) | {"nf4": nf4}
    return MergeReport((), LayerReport("all layers", 0.003, error, cosine, projection), losses)


def test_conclusions_follow_the_measured_losses():
    report = report_with(
        {"base": 3.0, "trained": 1.0, "float32": 1.0, "bfloat16": 1.06, "nf4": 2.08}
    )
    assert report.recovery == pytest.approx({"float32": 1.0, "bfloat16": 0.97, "nf4": 0.46})
    sentences = report.conclusions
    adapter = "nats against the unmerged adapter"
    assert sentences["float32"] == (
        f"keeps 100.0% of what the adapter learned, +0.000 {adapter}; safe."
    )
    assert sentences["bfloat16"] == (
        f"keeps 97.0% of what the adapter learned, +0.060 {adapter}; a small loss."
    )
    assert sentences["nf4"] == (
        f"loses 54.0% of what the adapter learned, +1.080 {adapter}; keep the adapter separate, or "
        "merge into float32."
    )
    assert "merge into nf4: loses 54.0%" in str(report) and "nf4: loses" in report._repr_html_()


def test_a_merge_is_judged_by_its_nats_too():
    """An adapter that lowers the loss from 11 to 1 keeps 98 % of it with 22 % more perplexity."""
    report = report_with({"base": 11.0, "trained": 1.0, "nf4": 1.2, "float32": 1.03})
    assert report.recovery["nf4"] == pytest.approx(0.98)
    assert report.conclusions["nf4"].startswith("loses 2.0%")
    assert report.conclusions["float32"].endswith("a small loss.")
    assert "+0.200 nats" in (report.refusal("nf4") or "")


def test_refusal_is_by_loss_or_by_projection_without_rows():
    good = {"base": 10.8, "trained": 0.768, "nf4": 0.79}
    assert (
        report_with(good, nf4=0.1).refusal("nf4") is None
    )  # measured: the projection is not asked
    assert "recovery 0.030" in (report_with(good | {"nf4": 10.5}).refusal("nf4") or "")
    assert report_with({}).refusal("nf4") is None
    assert report_with({}, nf4=0.1).refusal("nf4") == (
        "projection 0.10 on the update, expected 0.9 or more"
    )
    # rows that do not show what the adapter learned do not decide
    useless = {"base": 1.0, "trained": 1.0, "nf4": 1.0}
    assert "projection" in (report_with(useless, nf4=0.1).refusal("nf4") or "")
    # storages in 16 bits are not refused; a model without 4 bits has no such target
    assert report_with(good | {"bfloat16": 9.0}).refusal("bfloat16") is None
    dense, _ = layer_with(0.1, quantize=False)
    assert merge_report(dense).refusal("nf4") is None


def test_the_original_has_a_base_of_its_own_and_the_best_4_bits_are_named():
    losses = {"base": 3.0, "trained": 1.0, "original base": 2.5, "original": 1.3}
    report = report_with(losses | {"nf4": 1.2, "original-nf4": 1.1})
    assert report.recovery == pytest.approx({"original": 0.8, "nf4": 0.9, "original-nf4": 0.95})
    assert report.preferred == "original-nf4"
    assert "in 4 bits, original-nf4 has the lowest loss." in str(report)
    assert report_with(losses).preferred is None


def test_conclusions_without_rows_state_what_is_unknown():
    weights = report_with({}).conclusions
    assert weights["float32"].endswith("safe.")
    assert "cannot tell what this costs" in weights["bfloat16"]
    assert weights["nf4"].startswith(
        "stores 98% of the adapter's update, and adds noise of 2.40% of the weights."
    )
    lost = report_with({}, nf4=0.03).conclusions
    assert lost["nf4"].startswith("stores 3% of the adapter's update; keep the adapter separate")
    useless = report_with({"base": 1.0, "trained": 1.0, "float32": 1.0})
    assert useless.recovery == {} and "does not lower the loss on these rows" in str(useless)


def test_report_with_data_measures_each_merge():
    model = llama()
    quantize_model(model)
    inject(model, LoRAConfig(r=4, target_modules="all-linear"))
    data = rows(6)
    train(model, Letters(), data, TrainConfig(max_steps=3, learning_rate=0.02))
    report = merge_report(model, tokenizer=Letters(), data=data)
    assert list(report.losses) == ["base", "trained", "float32", "bfloat16", "float16", "nf4"]
    for target in report.total.error:
        merged = merge(model, target).float() if target != "nf4" else merge(model, target)
        loss = evaluate(merged, Letters(), data, max_new_tokens=0).loss
        # the report computes 16-bit merges in 16 bits
        assert report.losses[target] == pytest.approx(loss, rel=0.02)
    trained = evaluate(model, Letters(), data, max_new_tokens=0).loss
    assert report.losses["trained"] == trained < report.losses["base"]
    assert report.rows == 6 and "losses of 6 held-out rows" in str(report)
    other = merge_report(model, tokenizer=Letters(), data=data, seed=1, rows=2)
    assert other.rows == 2
    expected = evaluate(merge(model, "nf4", seed=1), Letters(), data[:2], max_new_tokens=0).loss
    assert other.losses["nf4"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="rows: expected at least 1"):
        merge_report(model, tokenizer=Letters(), data=data, rows=0)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        merge_report(model, data=data)


def test_report_with_the_original_measures_its_targets():
    original = llama()
    model = copy.deepcopy(original)
    quantize_model(model)
    config = LoRAConfig(r=4, target_modules="all-linear")
    inject(model, config)
    data = rows(4)
    train(model, Letters(), data, TrainConfig(max_steps=3, learning_rate=0.02))
    report = merge_report(model, original, tokenizer=Letters(), data=data)
    assert "original" not in report.losses  # the adapter is not loaded there
    merged = merge(model, "nf4", original=original)
    expected = evaluate(merged, Letters(), data, max_new_tokens=0).loss
    assert report.losses["original-nf4"] == pytest.approx(expected)
    assert report.preferred in ("nf4", "original-nf4")

    before = evaluate(original, Letters(), data, max_new_tokens=0).loss
    inject(original, config)
    for path, layer in lora_layers(model).items():
        state = layer.adapters["default"].state_dict()
        lora_layers(original)[path].adapters["default"].load_state_dict(state)
    report = merge_report(model, original, tokenizer=Letters(), data=data)
    assert report.losses["original base"] == pytest.approx(before)
    loss = evaluate(merge(original), Letters(), data, max_new_tokens=0).loss
    assert report.losses["original"] == pytest.approx(loss)


def test_an_update_that_the_scales_cannot_hold_is_a_verdict_of_the_report():
    model = llama()
    quantize_model(model)
    inject(model, LoRAConfig(r=4, target_modules=["up_proj"]))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].lora_B, std=10.0)
    report = merge_report(model, tokenizer=Letters(), data=rows(2))
    assert report.conclusions["nf4"].startswith("is refused. model.layers.0.mlp.up_proj")
    assert "nf4" not in report.losses and "nearest" in (report.refusal("nf4") or "")


# ---- error


def test_impossible_reports_and_merges_raise():
    with pytest.raises(ValueError, match="changes anything"):
        merge_report(lora())
    model, original = layer_with(0.1)
    with pytest.raises(ValueError, match="original: expected a dense weight of shape"):
        merge_report(model, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="rounding: expected one of"):
        merge_report(model, rounding="up")
    with pytest.raises(ValueError, match="storage: expected None or one of"):
        merge(model, "int8")
    dense, _ = layer_with(0.1, quantize=False)
    with pytest.raises(ValueError, match="no layer with an active adapter is in 4 bits"):
        merge(dense, "nf4")
