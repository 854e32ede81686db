"""Tests of batches in which each row has its own adapter.

Each row equals the same row of the batch under its adapter alone, in one pass, in generation and in
training. An adapter can be loaded from disk, moved and switched while models run. Oracle:
`set_adapter` and the whole batch. The bound is 1e-5 in fp32: batched products sum in another order.
"""

import pytest
import torch
from torch import nn

import minilora as ml
from helpers.kinds import TOKENS, close, output, shake
from helpers.tiny import oracle, twin
from helpers.toy import Letters, llama
from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.lora.registry import lora_layers
from minilora.models.padded_batch import inference

ADAPTERS = {
    "four": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "biased": {"r": 3, "lora_bias": True, "target_modules": ["v_proj", "q_proj"]},
    "pissa": {"r": 3, "init_lora_weights": "pissa", "target_modules": ["o_proj"]},
}


def adapted(model: nn.Module | None = None, **more) -> nn.Module:
    model = twin(oracle(num_hidden_layers=2)) if model is None else model
    for seed, (name, given) in enumerate((ADAPTERS | more).items()):
        ml.inject(model, ml.LoRAConfig(**given), name=name)
        shake(model, seed)
    return model


def alone(model: nn.Module, names, tokens) -> torch.Tensor:
    """Return each row of the batch, computed with its adapter active for the whole batch."""
    found = []
    for row, name in enumerate(names):
        ml.set_adapter(model, [] if name is None else name)
        with torch.no_grad():
            out = model(tokens)
        found.append((out if isinstance(out, torch.Tensor) else out.logits)[row])
    return torch.stack(found)


# ---- oracle


@pytest.mark.parametrize("kind", ["ours", "transformers", "4 bits", "one token"])
def test_each_row_equals_a_batch_under_its_adapter(kind):
    model = (
        oracle(num_hidden_layers=2) if kind == "transformers" else twin(oracle(num_hidden_layers=2))
    )
    if kind == "4 bits":
        ml.quantize_model(model)
    adapted(model)
    names = ["two", None, "four", "pissa", "biased", "four"]
    tokens = TOKENS[0].repeat(6, 1)[:, : 1 if kind == "one token" else None]
    expected = alone(model, names, tokens)
    assert (
        min(
            (a - b).abs().max()
            for i, a in enumerate(expected)
            for b in expected[:i]
            if names[i] != "four"
        )
        > 1e-2
    )
    fused = [layer.fused for layer in lora_layers(model).values()]
    with ml.per_row_adapters(model, names), torch.no_grad():
        out = model(tokens)
    close(out if isinstance(out, torch.Tensor) else out.logits, expected, 1e-5)
    assert [layer.fused for layer in lora_layers(model).values()] == fused


@pytest.mark.filterwarnings("error")  # torch warns when it resizes an output buffer
def test_changed_rows_are_gathered_again_in_the_same_memory():
    """The turns have fewer rows, more rows, other ranks, no adapters, and inference mode."""
    model = adapted()
    turns = [
        ["two", "four", None],
        ["four", "two"],
        ["two"] * 4,
        [None, None],
        ["four", "biased"],
        ["pissa", None],
    ]
    expected = [alone(model, names, TOKENS[0].repeat(len(names), 1)) for names in turns]
    with ml.per_row_adapters(model, ["two", "four", "biased", "pissa"]) as rows:
        used = []
        for names, logits in zip(turns, expected, strict=True):
            rows.choose(names)
            with torch.inference_mode(len(used) % 2 == 0), torch.no_grad():
                close(model(TOKENS[0].repeat(len(names), 1)), logits, 1e-5)
            used.append({key: room.data_ptr() for key, room in rows.buffers.items()})
    assert used[1] == used[0] and used[2] != used[1]


def test_a_single_token_in_bf16_is_rounded_once():
    """h + s B A x is summed in fp32 from the base's h.

    The error is at most half a unit in the last place of bf16 (2^-8), and 1e-6 for fp32.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40, dtype=torch.bfloat16))
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["0"]))
    adapter = shake(model, 1)[0].adapters["default"]
    x = torch.randn(3, 1, 48).bfloat16()
    with torch.no_grad(), ml.per_row_adapters(model, ["default"] * 3):
        found, h = model(x).double(), model[0].base_layer(x).double()
        added = adapter.scaling * x.double() @ adapter.lora_A.double().T @ adapter.lora_B.double().T
    assert found.dtype == torch.float64 and added.abs().mean() > 0.1
    assert ((found - h - added).abs() <= (h + added).abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_generation_gives_each_prompt_its_adapter(batch_size):
    """Answers have different lengths: finished rows leave the batch, and so do their adapters."""
    model = adapted(llama())
    prompts = [
        "a common start, one",
        "a common start, another",
        "a",
        "b c d",
        "a common start, one",
    ]
    names = ["four", "two", None, "pissa", "biased"]
    options = {
        "max_new_tokens": 12,
        "stop": [ord("a") + 3, ord("e") + 3, ord("t") + 3],
        "batch_size": batch_size,
    }
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        ml.set_adapter(model, [] if name is None else name)
        expected.append(ml.generate(model, Letters(), prompt, **options))
    assert len({*expected}) == 5 and len({*map(len, expected)}) > 1
    assert ml.generate(model, Letters(), prompts, adapters=names, **options) == expected


def test_gradients_reach_each_row_s_adapter():
    model = adapted().train()
    names, tokens = ["two", "four", None], TOKENS[0].repeat(3, 1)
    for layer in lora_layers(model).values():
        layer.adapters.requires_grad_(True)
    with ml.per_row_adapters(model, names):
        model(tokens).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(names[:2]):
        ml.set_adapter(model, name)
        model(tokens)[row].square().sum().backward()
    expected = {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert {name for name, g in found.items() if g.any()} == {*expected}
    for name, gradient in expected.items():
        close(found[name], gradient, 2e-5)


# ---- property


def test_in_place_changes_of_an_adapter_take_effect(tmp_path):
    model = adapted()
    ml.set_adapter(model, "four")
    ml.save_adapter(shake(model, 7), tmp_path, name="four")
    swapped = output(model)
    ml.load_adapter(model, tmp_path, name="four")
    shake(model, 8)
    with ml.per_row_adapters(model, ["four", "four"]) as rows, torch.no_grad():
        first = model(TOKENS)
        kept = {key: value[-1] for key, value in rows.cache.items()}
        assert torch.equal(model(TOKENS), first)
        assert all(
            value[-1] is kept[key] for key, value in rows.cache.items()
        )  # not gathered again
        ml.load_adapter(model, tmp_path, name="four")
        close(model(TOKENS), swapped, 1e-5)
    assert not torch.equal(first, swapped)


def test_loading_an_adapter_keeps_the_base_and_recompiles_nothing(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = adapted()
    ml.set_adapter(model, "four")
    before = output(model)
    ml.save_adapter(model, tmp_path, name="four")
    shake(model, 3)
    held = {
        name: (p.data_ptr(), p._version)
        for name, p in model.named_parameters()
        if "adapters" not in name
    }
    compiled = torch.compile(model, backend=backend)
    with inference(model):
        changed, count = compiled(TOKENS), len(graphs)
        ml.load_adapter(model, tmp_path, name="four")
        close(compiled(TOKENS), before, 1e-5)
    assert len(graphs) == count > 0 and (changed - before).abs().max() > 0.1
    assert held == {
        n: (p.data_ptr(), p._version) for n, p in model.named_parameters() if "adapters" not in n
    }


def test_adapter_moves_to_its_layers_device_when_activated(monkeypatch):
    """`meta` stands for a second device; a copy from it is only recorded."""
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["0"]), name="there")
    layer = model[0]
    assert isinstance(layer, LoRALayer)
    layer.adapters["waits"] = waiting = LoRAAdapter(8, 8, 2).requires_grad_(False)
    sent, to = [], nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda m, d: sent.append((m, d)) if str(d) == "cpu" else to(m, d)
    )
    ml.set_adapter(model, "there")
    assert waiting.lora_A.device.type == "cpu" and not sent
    ml.set_adapter(model, "waits")
    assert waiting.lora_A.is_meta and not sent
    ml.set_adapter(model, "waits", offload=True)
    assert sent == [(layer.adapters["there"], torch.device("cpu"))]


# ---- error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"use_dora": True, "target_modules": ["q_proj"]},
            "q_proj: DoRAAdapter cannot be chosen row by row",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            "embed_tokens: EmbeddingAdapter cannot be chosen row by row",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "trains whole modules or biases",
        ),
    ],
)
def test_adapters_that_cannot_differ_by_row_are_refused(given, message):
    model = adapted(other={"r": 2} | given)
    with pytest.raises(ValueError, match=message), ml.per_row_adapters(model, ["four", "other"]):
        pass
    # The other adapters of the model still work.
    with ml.per_row_adapters(model, ["four", "two"]), torch.no_grad():
        model(TOKENS)


def test_wrong_counts_unknown_names_and_dropout_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="3 adapters were named for 2 rows"):
        with ml.per_row_adapters(model, ["four", None, None]), torch.no_grad():
            model(TOKENS)
    with pytest.raises(ValueError, match="adapter: 'fuor' matches nothing. Nearest: 'four'"):
        with ml.per_row_adapters(model, ["fuor", None]):
            pass
    with pytest.raises(ValueError, match="one name, or None, for each of 2 prompts"):
        ml.generate(adapted(llama()), Letters(), ["a", "b"], adapters=["four"])
    dropping = adapted(drops={"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj"]}).train()
    with pytest.raises(ValueError, match="lora_dropout is not drawn row by row"):
        with ml.per_row_adapters(dropping, ["drops", None]):
            dropping(TOKENS)
