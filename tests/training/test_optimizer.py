"""Proves the optimiser options: 8-bit AdamW, LoRA+, weight decay and NEFTune.

8-bit AdamW keeps its values in the stated number of bytes. LoRA+ and weight decay reach the right
parameters. NEFTune adds noise in training only.

Oracles: torch's AdamW, bitsandbytes' map and its 8-bit update on our own codes, transformers' rule
for weight decay.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.toy import FAST, Letters, adapters, llama, lora, rows
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.optim.adamw_8bit import (
    AdamW8bit,
    dequantize_moment,
    plain_update,
    quantize_moment,
)
from minilora.training.optim.neftune import noisy_embeddings
from minilora.training.optim.param_groups import new_optimizer
from minilora_kernels import dynamic_map
from minilora_kernels.nf4.codebook import midpoints

KNOBS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def stepped(kind, shape, steps, seed=0, **extra):
    """Return a parameter after some steps on seeded gradients, and its optimiser."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = kind([p], **KNOBS, **extra)
    for _ in range(steps):
        p.grad = (
            torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4
        )
        optimizer.step()
    return p, optimizer


def exact_codes(x, signed):
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    scales = blocks.abs().amax(1)
    inverse = 1 / scales.clamp_min(2.0**-126)
    return torch.bucketize(blocks * inverse[:, None], midpoints(dynamic_map(signed))), scales


# ---- oracle


def test_the_first_update_is_adamw():
    """Moments are rounded after they are used.

    fp32 sums in another order: a few ulp of values near 1.
    """
    ours, theirs = (stepped(kind, (64, 100), 1)[0] for kind in (AdamW8bit, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_small_parameters_keep_fp32_moments_and_stay_adamw():
    ours, theirs = (stepped(kind, (63, 65), 20)[0] for kind in (AdamW8bit, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_update_from_8_bits_is_bitsandbytes():
    """With the same codes, scales and gradient, the parameters agree to fp32 rounding.

    The stored moments differ: bitsandbytes' CPU code rounds through a table of 65,536 entries,
    which loses the small values of the map.
    """
    import bitsandbytes  # noqa: F401  registers the op

    p, optimizer = stepped(AdamW8bit, (32, 256), 3)
    state, group = optimizer.state[p], optimizer.param_groups[0]
    theirs, g = p.detach().clone(), torch.randn(p.shape)
    codes = [state[name].clone().view(p.shape) for name in ("exp_avg", "exp_avg_sq")]
    scales = [state[f"{name}_scale"].clone() for name in ("exp_avg", "exp_avg_sq")]
    beta1, beta2 = group["betas"]
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam",
        g,
        theirs,
        *codes,
        beta1,
        beta2,
        0.0,
        0.0,
        group["eps"],
        4,
        group["lr"],
        dynamic_map(),
        dynamic_map(False),
        *scales,
        group["weight_decay"],
        1.0,
    )
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(p.detach(), theirs, rtol=1e-6, atol=1e-7)


def test_every_operation_rounds_once_to_nearest():
    """Compare the update with numpy's fp32, operation by operation, so that a kernel can repeat it.

    torch fuses some of its own operations, in another order on a CPU than on a GPU, and MKL's root
    is not always the nearest number.
    """
    numbers = (0.9, 1 - 0.9, 0.99, 1 - 0.99, 1 / 0.3, 1e-8, 0.999, -1e-3)
    beta1, rest1, beta2, rest2, correction, eps, decay, rate = np.float32(numbers)
    p, g, m, v = torch.randn(4, 10001)
    p, v = p * 1e-3, v.abs()  # p is as large as its update, so that the sum loses no bit of it
    P, G, M, V = (t.clone().numpy() for t in (p, g, m, v))
    M = M * beta1 + G * rest1
    V = V * beta2 + G * G * rest2
    P = P * decay + M / (np.sqrt(V) * correction + eps) * rate
    plain_update(p, g, (m, v), numbers)
    assert P.dtype == np.float32 and all(np.array_equal(a, b) for a, b in ((p, P), (m, M), (v, V)))


def test_the_unsigned_map_is_bitsandbytes():
    from bitsandbytes.functional import create_dynamic_map

    theirs = create_dynamic_map(signed=False)
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # torch.linspace, which bitsandbytes calls, rounds twice without fused multiply-add: by an
        # ulp of the decade's largest value, which is up to 10 times the value.
        torch.testing.assert_close(dynamic_map(signed=False), theirs, rtol=10 * 2**-23, atol=0)
    else:
        assert torch.equal(dynamic_map(signed=False), theirs)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_groups_are_what_lora_plus_and_transformers_make(ratio):
    from transformers.trainer_pt_utils import get_parameter_names

    model = lora()
    model.model.norm.weight.requires_grad_(True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = new_optimizer(
        model, parameters, TrainConfig(loraplus_lr_ratio=ratio, weight_decay=0.1)
    )
    names = {id(p): name for name, p in parameters.items()}
    seen = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    decayed = set(get_parameter_names(model, [type(model.model.norm)], [r"bias"]))
    assert seen.keys() == parameters.keys()
    for name, group in seen.items():
        assert group["lr_ratio"] == (ratio if name.endswith("lora_B") else 1.0)
        assert group["weight_decay"] == (0.1 if name in decayed else 0.0)


# ---- property


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 700), st.booleans())
def test_codes_are_the_nearest_values_of_the_map(seed, n, signed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 9 - 8)
    x = x if signed else x.abs()
    x[torch.rand(n, generator=generator) < 0.1] = 0
    codes, scales = quantize_moment(x, signed)
    expected, expected_scales = exact_codes(x, signed)
    assert torch.equal(codes.long(), expected) and torch.equal(scales, expected_scales)
    # the signed map has no -1, so a block with a negative largest value shrinks when stored again
    if not signed:
        again = quantize_moment(dequantize_moment(codes, scales, signed), signed)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.parametrize("signed", [True, False])
def test_thresholds_and_their_neighbours(signed):
    at = midpoints(dynamic_map(signed))
    for x in (
        at,
        torch.nextafter(at, torch.tensor(2.0)),
        torch.nextafter(at, torch.tensor(-2.0)),
        dynamic_map(signed),
    ):
        x = torch.cat([x, torch.ones(256 - len(x))])
        assert torch.equal(quantize_moment(x, signed)[0].long(), exact_codes(x, signed)[0])


def test_two_bytes_a_parameter():
    p, optimizer = stepped(AdamW8bit, (128, 256), 2)
    kept = sum(value.nbytes for key, value in optimizer.state[p].items() if key != "step")
    assert kept == p.numel() * 2 + 2 * 4 * p.numel() // 256


def test_8_bit_adamw_reaches_the_losses_of_adamw():
    """In the steep part of a toy run the losses are 0.1 % apart; another seed is 20 % off."""
    config = {
        "learning_rate": 3e-3,
        "max_steps": 30,
        "save_steps": None,
        "lr_scheduler_type": "constant",
    }
    losses = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        model = llama(hidden_size=64, intermediate_size=128)
        model.requires_grad_(True)  # large enough for 8 bits; the adapter's matrices are not
        result = train(model, Letters(), rows(), TrainConfig(optim=optim, **config))
        losses[optim] = sum(result.losses[-10:]) / 10
    assert losses["adamw_8bit"] < 0.3 * result.losses[0]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw_torch"], rel=0.01)


def test_noise_in_training_only_and_of_the_stated_size():
    model, ids = llama(), torch.arange(3, 35)[None]
    plain = model.model.embed_tokens(ids)
    with noisy_embeddings(model, 5.0):
        assert torch.equal(model.eval().model.embed_tokens(ids), plain)
        noise = model.train().model.embed_tokens(ids) - plain
    bound = 5 / (32 * 32) ** 0.5  # α/√(T·D)
    assert 0.9 * bound < noise.abs().max() <= bound * 1.001 and abs(noise.mean()) < 0.1 * bound
    assert torch.equal(model.model.embed_tokens(ids), plain)


def test_noise_changes_training_and_repeats_with_the_seed():
    runs = [
        train(lora(), Letters(), rows(), TrainConfig(neftune_noise_alpha=a, **FAST)).losses
        for a in (0, 5, 5)
    ]
    assert runs[1] == runs[2] != runs[0]


# ---- round trip


def test_8_bit_moments_survive_a_resume_bit_for_bit(tmp_path):
    def run(folder, **fields):
        model = llama(hidden_size=64, intermediate_size=128).requires_grad_(True)
        config = TrainConfig(
            output_dir=folder, **(FAST | {"save_steps": 2, "optim": "adamw_8bit"} | fields)
        )
        return model, train(model, Letters(), rows(), config)

    whole, result = run(tmp_path)
    resumed, again = run(None, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.losses == result.losses
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="optim was adamw_8bit, is adamw_torch"):
        run(None, optim="adamw_torch", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_lora_plus_moves_b_more_from_the_first_step():
    """After one AdamW step every value has moved by about its rate; A's gradient starts at zero."""
    moved = {}
    for ratio in (1.0, 4.0):
        model = lora()
        before = adapters(model)
        train(
            model,
            Letters(),
            rows(),
            TrainConfig(loraplus_lr_ratio=ratio, **(FAST | {"max_steps": 1})),
        )
        moved[ratio] = max(
            (p - before[n]).abs().max().item() for n, p in adapters(model).items() if "lora_B" in n
        )
    # the difference is ε over the gradient
    assert moved[4.0] == pytest.approx(4 * moved[1.0], rel=1e-3)


# ---- error


def test_paged_moments_on_a_cpu_print_that_they_have_no_effect(capsys):
    train(lora(), Letters(), rows(), TrainConfig(optim="paged_adamw_8bit", **FAST))
    assert '"adamw_8bit"' in capsys.readouterr().out


def test_16_bit_parameters_are_refused():
    with pytest.raises(ValueError, match="expected parameters in fp32, got torch.bfloat16"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])
