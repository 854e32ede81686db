"""Tests, without a GPU, that the step of a token can be captured as a CUDA graph.

A graph replays operations with the addresses, shapes and numbers of its capture. `taped` simulates
this: it records each operation with its arguments and replays the operations on the same tensors,
without running the Python code again. Oracle: decoding with a growing cache, for every option of a
config. Property: rows that end, batches, padding, a cache that becomes full; no tensor of a step is
on the host. Then the conditions for a capture. tests/gpu/test_gpu.py captures real graphs.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minilora as ml
from helpers.chats import ours
from helpers.kinds import shake
from helpers.prompts import VOCABULARY, pair, ragged
from helpers.tiny import KINDS, oracle, tokens, twin
from minilora.generation import cuda_graph as graph
from minilora.generation.cuda_graph import Graphs, Step, obstacle
from minilora.generation.generate import generate, generate_ids
from minilora.generation.sampling import Decoding
from minilora.models.kv_cache import KVCache
from minilora.models.padded_batch import Context, inference

TOLERANCE = 2e-5  # as in test_context.py: some thirty fp32 roundings of logits of about 10
# Operations that wait for a value of the GPU.
HOST = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
}


class Tape(TorchDispatchMode):
    """Record of every operation in the context, with arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    # The next operation reads the result at its address in the step's memory.
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """List with a Tape for each capture by `taped`.

    The compiled steps are switched off, because they are not operations of torch.
    """
    monkeypatch.setenv("MINILORA_STEPS", "torch")
    TAPES.clear()
    return TAPES


TAPES: list[Tape] = []


def taped(read, device):
    """Replace cuda_graph.capture. As with a real capture, only a replay changes the state."""
    step = read.__self__
    state = [step.cache.at, step.positions, step.real, *step.cache.keys, *step.cache.values]
    before = [t.clone() for t in state]
    with Tape() as tape:
        out = read()
    for t, old in zip(state, before, strict=True):
        t.copy_(old)
    out.fill_(torch.nan)
    assert not HOST & {func.overloadpacket.__name__ for func, *_ in tape.calls}
    TAPES.append(tape)

    def replay() -> Tensor:
        tape.replay()
        return out

    return replay


# ---- oracle: the growing cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_gives_the_logits_of_the_growing_cache(kind, tapes):
    """Decode two rows with padding after a common beginning, to the last column of the cache.

    The rows become longer than a sliding window.
    """
    model = twin(oracle(**KINDS[kind]))
    with inference(model):
        start = Context(model)
        if not model.config.sliding_window:  # with a window, padding must be at the beginning
            start.extend([[3, 1, 4]])
        context = start.select([0, 0]) if start.real.numel() else start
        context.extend([[1, 5, 9, 2, 6, 5], [3, 5]])
        growing = context.select([0, 1])
        decode = Graphs(model, 8, taped)(context)
        for pair_of_tokens in tokens(8, 2).tolist():
            rows = [[token] for token in pair_of_tokens]
            torch.testing.assert_close(
                decode.extend(rows), growing.extend(rows), atol=TOLERANCE, rtol=0
            )
    assert len(tapes) == 1 and decode.step.replay is not None


def test_a_replayed_step_works_with_adapters_and_4_bit_layers(tapes):
    model = twin(oracle())
    ml.quantize_model(model)
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    shake(model)
    with inference(model):
        context = Context(model)
        context.extend([[1, 2, 3], [4]])
        growing, decode = context.select([0, 1]), Graphs(model, 8, taped)(context)
        for token in range(8):
            rows = [[token], [token + 1]]
            torch.testing.assert_close(
                decode.extend(rows), growing.extend(rows), atol=TOLERANCE, rtol=0
            )
    names = {func.overloadpacket.__name__ for func, *_ in tapes[0].calls}
    assert "gemv_nf4" in names and "index_copy_" in names


# ---- property: answers do not depend on graphs


@pytest.fixture
def everywhere(monkeypatch, tapes) -> list[Tape]:
    """Let cuda_graph=True use `taped`, with small steps that become full."""
    monkeypatch.setattr(
        "minilora.generation.generate.graphs",
        lambda model, wanted, rows, new: Graphs(model, new, taped),
    )
    monkeypatch.setattr(graph, "LEAST", 16)
    monkeypatch.setattr(graph, "UNIT", 4)
    return tapes


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 6}], ids=["no window", "window"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_with_and_without_graphs_are_equal(fields, temperature, everywhere):
    """Rows of different lengths end at different times, in batches that share steps."""
    _, mine = pair("mistral", **({"sliding_window": None} | fields))
    prompts = ragged(3, 12, 1, 7, 7, 2, 2, common=5)
    ends = frozenset(range(0, VOCABULARY, 11))  # one token in eleven ends an answer
    for batch_size in (1, 3, 7):
        rule = {"temperature": temperature, "seed": 5, "batch_size": batch_size, "ends": ends}
        expected = generate_ids(mine, prompts, Decoding(30, cuda_graph=False, **rule))
        assert generate_ids(mine, prompts, Decoding(30, cuda_graph=True, **rule)) == expected
        assert len({len(answer) for answer in expected}) > 3


def test_a_step_is_captured_once_per_shape_and_again_when_it_is_full(everywhere):
    _, mine = pair()
    prompts = ragged(*[4] * 6)

    def captured(new_tokens: int, batch_size: int) -> list[tuple[int, int]]:
        """Return (rows, columns) of each capture."""
        everywhere.clear()
        generate_ids(mine, prompts, Decoding(new_tokens, batch_size=batch_size, cuda_graph=True))
        masks = [
            next(args[0] for f, args, *_ in tape.calls if "index_fill_" in str(f))
            for tape in everywhere
        ]
        return [tuple(mask.shape) for mask in masks]

    assert captured(2, 6) == []  # a single step; only the second step is captured
    assert captured(8, 2) == [(2, 12)]  # 4 + 8 tokens, three batches
    assert captured(40, 6) == [(6, 16), (6, 32), (6, 44)]


def test_a_step_shrinks_when_half_of_its_rows_have_ended(everywhere):
    """With 3 of 5 rows left the step stays. With 2 left they move to a step of 2 rows.

    The moved rows keep their keys and values.
    """
    _, mine = pair()
    with inference(mine):
        context = Context(mine)
        context.extend(ragged(5, 1, 4, 2, 3))
        growing, decode = context.select(range(5)), Graphs(mine, 30, taped)(context)
        for chosen, size in (([0, 1, 2, 3, 4], 5), ([4, 2, 1], 5), ([2, 0], 2), ([1], 1)):
            decode, growing = decode.select(chosen), growing.select(chosen)
            assert decode.step.rows == size
            for token in (7, 8, 9):
                rows = [[token + place] for place in range(len(chosen))]
                torch.testing.assert_close(
                    decode.extend(rows), growing.extend(rows), atol=TOLERANCE, rtol=0
                )


# ---- property: a step stays on its device


@pytest.mark.parametrize("kind", ["llama", "llama3", "gemma3", "qwen3 window between"])
@pytest.mark.parametrize("bits", [4, 32])
def test_no_tensor_of_a_step_is_on_the_host(kind, bits):
    """On the device "meta", which has no values, a copy from or to the CPU is detected."""
    model = twin(oracle(**KINDS[kind]))
    if bits == 4:
        ml.quantize_model(model)
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    model.to("meta")
    config, like = model.config, KVCache()
    for buffers in (like.keys, like.values):
        shape = 2, config.num_key_value_heads, 7, config.head_dim
        buffers += [torch.empty(shape, device="meta") for _ in config.layer_types]
    step = Step(model, like, 2, 64, taped)
    with inference(model):
        with Tape() as first:
            step.read()  # moves RoPE's frequencies to the device
        with Tape() as second:
            step.read()
    assert not on_one_device(first) and on_one_device(second)
    assert len(second.calls) > 100


def on_one_device(tape: Tape) -> bool:
    """Return True if all arguments and results of the operations are on the step's device."""
    found = [t for _, *rest in tape.calls for t in tree_leaves(rest) if isinstance(t, Tensor)]
    return all(t.is_meta for t in found)


# ---- conditions for a capture


def on_fake_gpu(model: nn.Module) -> nn.Module:
    """Replace the parameters by fake CUDA tensors, which have a shape and no values."""
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                fake = None if p is None else torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = (
                    fake if fake is None else nn.Parameter(fake, requires_grad=False)
                )
    return model


def test_auto_captures_for_small_batches_and_true_for_all():
    with_adapter = twin(oracle())
    ml.inject(with_adapter, ml.LoRAConfig(target_modules="all-linear"))
    model = on_fake_gpu(with_adapter)
    assert obstacle(model) is None
    for wanted, rows, new_tokens, fits in (
        *(("auto", graph.ROWS, graph.TOKENS, True), ("auto", graph.ROWS + 1, graph.TOKENS, False)),
        *(("auto", graph.ROWS, graph.TOKENS - 1, False), (True, graph.ROWS + 1, 1, True)),
    ):
        assert isinstance(graph.graphs(model, wanted, rows, new_tokens), Graphs) == fits

    class Strange(nn.Module):  # a module with an unknown forward
        pass

    model.strange = Strange()
    assert not isinstance(graph.graphs(model, "auto", 1, 99), Graphs)
    assert isinstance(graph.graphs(model, True, 1, 99), Graphs)


def _compile(model):
    model._compiled_call_impl = print  # model.compile() sets this attribute


OBSTACLES = {
    "has a hook": lambda model: model.model.layers[1].register_forward_hook(print),
    "has a hook or a replaced": lambda model: model.model.norm.register_forward_pre_hook(print),
    "a replaced forward": lambda model: setattr(model.model.norm, "forward", print),
    "is compiled": _compile,
    "the model is sharded": lambda model: setattr(model.model, "unshard", print),
    "parts of the model are on cuda:0 and cpu": lambda model: setattr(
        model.model.norm, "weight", nn.Parameter(torch.ones(64))
    ),
    "model are on cuda:0 and cpu": lambda model: model.model.norm.register_buffer(
        "left behind", torch.ones(64)
    ),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_an_obstacle_raises_with_true_and_disables_auto(why):
    model = on_fake_gpu(twin(oracle()))
    OBSTACLES[why](model)
    with pytest.raises(ValueError, match=f"cuda_graph=True: .*{why}.* Leave it at 'auto'"):
        graph.graphs(model, True, 1, 99)
    assert not isinstance(graph.graphs(model, "auto", 1, 99), Graphs)


def test_4_bit_layers_without_triton_and_autocast_are_obstacles(monkeypatch):
    model = twin(oracle())
    ml.quantize_model(model)
    on_fake_gpu(model)
    monkeypatch.setenv("MINILORA_NF4", "reference")
    assert "path 'reference'" in (obstacle(model) or "")
    dense = on_fake_gpu(twin(oracle()))
    assert obstacle(dense) is None  # no 4-bit layers
    # autocast for a CPU has no effect on a GPU
    for kind, why in (
        ("cpu", "path 'reference'"),
        ("cuda", "autocast"),
    ):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device, kind=kind: device == kind)
        assert why in (obstacle(model) or "")
    assert "autocast" in (obstacle(dense) or "")


def test_cuda_graph_refuses_a_model_on_a_cpu_or_of_transformers():
    theirs, mine = pair()
    with pytest.raises(ValueError, match="CUDA graphs need a GPU, and the model is on cpu"):
        generate(mine, ours("chatml"), "hello", cuda_graph=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not minilora's decoder"):
        generate(theirs, ours("chatml"), "hello", cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph must be 'auto', True or False, got 'yes'"):
        generate(mine, ours("chatml"), "hello", cuda_graph="yes")
    rule = {"max_new_tokens": 40, "ends": frozenset()}
    assert generate_ids(mine, [[1, 2]], Decoding(**rule)) == generate_ids(
        mine, [[1, 2]], Decoding(**rule, cuda_graph=False)
    )
