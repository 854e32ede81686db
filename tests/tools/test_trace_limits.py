"""Proves that a trace leaves nothing behind, keeps few tensors and shows every step.

It also tests traces of other layers, and errors that change nothing. test_trace.py proves that the
figures are right.
"""

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

import minilora as ml
from helpers import toy
from helpers.source import text
from helpers.toy import noise
from minilora.tools.trace import forward
from minilora_kernels.ops.mode import plain_now
from tests.tools.test_trace import layer, linear, run_step

# ---- other layers


def test_other_layers_and_adapters():
    """Trace dense and 4-bit layers without an adapter, and a disabled adapter.

    For embeddings and convolutions the steps of the adapter are not shown.
    """
    model = nn.Sequential(
        nn.Embedding(9, 48), linear(), nn.Unflatten(1, (40, 1)), nn.Conv1d(40, 6, 1)
    )
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["0", "3"]))
    model[1] = ml.NF4Linear.from_linear(linear())
    with ml.trace(model) as t:
        run_step(model, torch.arange(5))
        with ml.disable_adapters(model):
            model(torch.arange(5))
    assert {name: set(found) & {"sum", "h", "W"} for name, found in t.items()} == {
        "0": set(),
        "1": {"W"},
        "3": set(),
    }
    assert t["3"]["xW"].maths == "Conv1d of x" and t["0"].calls == 2
    with ml.trace(model) as t:
        run_step(model, torch.arange(5))
    assert (
        t["0"]["sum"].maths == "xW + the update of EmbeddingAdapter, whose steps are not shown"
        and t["0"]["x"].max == 4
    )
    with ml.trace(model, "3", tensors=True) as t:
        x = noise(5, 40, 1)
        model[3].adapters["default"].lora_B.data.normal_()
        model[3](x).square().sum().backward()
    assert torch.equal(t["3"]["dx"].tensor, x.grad)


def test_only_the_last_call_is_traced():
    """It contains no backward of an earlier call or of a copy, and no call after the trace."""
    made = layer()
    with ml.trace(made) as t:
        first, second = made(noise(3, 48)), made(noise(5, 48))
        copy.deepcopy(made)(noise(7, 48)).sum().backward()
        first.sum().backward()
        assert t["LoRALayer"].calls == 2 and t["x"].shape == (5, 48) and "dA" not in t["LoRALayer"]
        made.adapters["default"].lora_A.grad = None
        second.sum().backward(retain_graph=True)
        second.sum().backward(retain_graph=True)
    assert torch.equal(2 * t["dA"].tensor, made.adapters["default"].lora_A.grad)
    last = t["dA"]
    (3 * second).sum().backward()
    made(noise(2, 48))
    assert t["dA"] is last and t["LoRALayer"].calls == 2


def test_reentrant_checkpointing_is_followed():
    made, x = layer(), noise(3, 48)
    with ml.trace(made) as t:
        checkpoint(made, x, use_reentrant=True).sum().backward()
    assert torch.equal(t["dx"].tensor, x.grad)


def test_the_weight_is_shown_in_the_dtype_it_was_used_in():
    made = layer()
    with ml.trace(made) as t:
        made(noise(3, 48))
        assert t["W"].dtype == torch.float32
        made(noise(3, 48, dtype=torch.bfloat16))
        assert t["W"].dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            made(noise(3, 48))
    assert torch.equal(t["W"].tensor, made.base_layer.dequantize(torch.float16))


# ---- clean-up and kept tensors


def state(model: nn.Module) -> Any:
    """Return everything that a trace could leave in a model."""
    hooks = len(optimizers._global_optimizer_pre_hooks) + len(
        optimizers._global_optimizer_post_hooks
    )
    inside = [
        (set(vars(m)), [len(v) for k, v in vars(m).items() if "hooks" in k])
        for m in model.modules()
    ]
    return (
        inside,
        hooks,
        [len(p._backward_hooks or ()) for p in model.parameters()],
        plain_now(),
        dict(forward._taps),
    )


def test_a_trace_leaves_nothing_behind():
    model = toy.lora()
    model.lm_head.weight.requires_grad_()
    before = state(model)
    with ml.trace(model):
        y = model(torch.randint(3, 99, (1, 5)))
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(RuntimeError, match="no such"), ml.trace(model) as t:
        model(torch.randint(3, 99, (1, 5)))
        raise RuntimeError("no such")
    assert state(model) == before and t["layers.0.mlp.up_proj"]["h"].rms > 0
    y.sum().backward()
    del y
    assert (
        state(model) == before
        and model.model.layers[0].mlp.up_proj.forward.__func__ is ml.LoRALayer.forward
    )


def test_nested_traces_each_record_the_calls_inside_them():
    made = layer()
    with ml.trace(made) as outer:
        made(noise(2, 48))
        with ml.trace(made) as inner:
            y = made(noise(3, 48))
        y.sum().backward()
        assert inner["x"].shape == outer["x"].shape == (3, 48)
        assert "dA" in outer["LoRALayer"] and "dA" not in inner["LoRALayer"]
        made(noise(4, 48))
    assert (outer["LoRALayer"].calls, inner["LoRALayer"].calls) == (3, 1) and outer["x"].shape == (
        4,
        48,
    )
    assert "forward" not in vars(made)


def test_only_figures_are_kept_for_a_whole_model():
    model = toy.lora(toy.llama(num_hidden_layers=30))
    ids = torch.randint(3, 99, (4, 64))
    with ml.trace(model) as t:
        run_step(model, ids)
    assert len(t) == 30 * 7 + 1 and all(
        step.kept is None for one in t.values() for step in one.values()
    )
    with pytest.raises(
        ValueError, match=r"'h': of several traced layers only figures are kept.*tensors=True"
    ):
        t["layers.29.mlp.up_proj"]["h"].tensor  # noqa: B018  # the lookup is the test
    with ml.trace(model, "layers.29.mlp.up_proj") as t:
        run_step(model, ids)
    kept = sum(step.tensor.nbytes for step in t["up_proj"].values())
    assert t["h"].tensor.shape == (4, 64, 64) and f"{kept / 1e6:,.1f} MB kept" in str(t)
    with ml.trace(model, ["layers.1.mlp.up_proj", "layers.2.self_attn.q_proj"], tensors=True) as t:
        run_step(model, ids)
    assert [name.split(".")[-1] for name in t] == ["up_proj", "q_proj"] and t["q_proj"][
        "h"
    ].kept is not None


# ---- display


class Page(HTMLParser):
    """Parser that collects the tags and the cells of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_a_notebook_shows_the_same_cells_as_the_text():
    holder = nn.ModuleDict({"<b>": layer(), "<i>": layer()})
    with ml.trace(holder) as several:
        pass
    assert {"<b>", "<i>"} <= {*Page(several._repr_html_()).cells}
    with ml.trace(holder, "<b>") as t:
        holder["<b>"](noise(3, 48)).sum().backward()
    page = Page(t._repr_html_())
    assert page.tags == {"div", "style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert (
        all(cell in page.cells for step in t["<b>"].values() for cell in step.cells())
        and "<b>" not in t._repr_html_()
    )
    with ml.trace(toy.lora()) as t:
        pass
    assert {*t} <= {*Page(t._repr_html_()).cells}
    assert not re.search(
        r"[^-]color: *#|background: *(#|white|black)", t._repr_html_().replace("#8883", "")
    )


def test_the_docs_page_shows_the_printed_trace(capsys):
    found = re.search(
        r"<!-- trace -->\n```python\n(.*?)```\n\n```\n(.*?)```\n<!-- /trace -->",
        text("docs/trace.md"),
        re.S,
    )
    assert found
    exec(found[1], {"ml": ml, "torch": torch})
    assert capsys.readouterr().out == found[2]


# ---- errors that change nothing


def test_names_that_match_no_layer_or_step_raise():
    model = toy.lora()
    before = state(model)
    for entry in ("layers.0.mlp.upproj", ["q_proj", "nothing"]):
        with (
            pytest.raises(ValueError, match="layers: '.*' matches nothing. Nearest"),
            ml.trace(model, entry),
        ):
            pass
    with (
        pytest.raises(
            ValueError, match="Sequential has no LoRALayer, QuantizedLinear or nn.Linear"
        ),
        ml.trace(nn.Sequential()),
    ):
        pass
    with ml.trace(model) as t:
        layer()(noise(3, 48))  # not in the model
    for name, message in (
        ("up_proj", "is 2 layers, 'model.layers.0.mlp.up_proj' the first"),
        ("xyz", "layer: 'xyz'"),
    ):
        with pytest.raises(ValueError, match=message):
            t[name]
    with pytest.raises(
        ValueError, match=r"q_proj: step: 'xA' matches nothing.*The layer was not called"
    ):
        t["layers.0.self_attn.q_proj"]["xA"]
    with (
        ml.trace(layer()) as t,
        pytest.raises(ValueError, match="'normalised' matches nothing.*`source`"),
    ):
        t["normalised"]
    assert state(model) == before


def test_sources_that_differ_from_the_weight_raise():
    made = layer()
    wrong = linear().weight + 0.01 * noise(40, 48)
    cases = [
        (made, wrong, r"source: \d+ of its 1920 codes differ from the stored ones"),
        (made, linear().weight.T, r"expected the shape \(40, 48\), got \(48, 40\)"),
        (made, {}, "expected LoRALayer.weight too"),
        (layer("dense"), linear().weight, "no 4-bit layer is traced"),
        (nn.Sequential(layer(), layer()), linear().weight, "expected 1.weight too"),
    ]
    for module, source, message in cases:
        before = state(module)
        with pytest.raises(ValueError, match=message), ml.trace(module, source=source):
            pass
        assert state(module) == before
    with ml.trace(
        nn.Sequential(made), source={"0.weight": linear().weight, "1.weight": wrong}
    ) as t:
        pass
    assert t["normalised"].max == 1


def test_layers_that_cannot_run_step_by_step_raise():
    compiled, replaced = layer(), layer()
    compiled.compile()
    replaced.forward = replaced.base_layer.forward
    cases = [
        (compiled, "compiled"),
        (torch.compile(layer()), "compiled"),
        (nn.Linear(2, 2, device="meta"), "Linear is on the meta device"),
        (replaced, "forward of LoRALayer was replaced"),
    ]
    for module, message in cases:
        before = state(module)
        with pytest.raises(ValueError, match=message), ml.trace(module):
            pass
        assert state(module) == before
