"""Proves that the buffer pool returns ordinary tensors, reuses freed memory and stays bounded."""

import gc
import threading
from unittest.mock import Mock, call

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helpers.toy import llama
from minilora.training import runtime
from minilora_kernels import allocator, dequantize_nf4, quantize_nf4

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone():
    gc.collect()
    allocator.release()
    yield
    gc.collect()
    allocator.release()


def waiting() -> int:
    return sum(size * len(blocks) for size, blocks in allocator._waiting.items())


def big(size: int = allocator.SMALL) -> torch.Tensor:
    return allocator.empty((size,), torch.uint8, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_pooled_tensor_behaves_like_any_other(dtype):
    x = allocator.empty((3, 1 << 18, 2), dtype, CPU)
    assert (
        x.shape == (3, 1 << 18, 2)
        and x.dtype == dtype
        and x.is_contiguous()
        and type(x) is torch.Tensor
    )
    x.fill_(1)
    view, copy = x[1, :, 0], x.clone()
    del x
    # the view keeps its block in use, so this is another one
    again = allocator.empty((3, 1 << 18, 2), dtype, CPU).fill_(0)
    assert (
        view.sum(dtype=torch.float64) == 1 << 18
        and copy.sum(dtype=torch.float64) == 3 << 19
        and not again.any()
    )


def test_a_freed_block_is_reused_if_it_fits():
    x = big()
    place = x.data_ptr()
    del x
    # the freed block is too small for this tensor
    assert waiting() == allocator.SMALL and big(allocator.SMALL + 1).data_ptr() != place
    fitting = big(allocator.SMALL)
    assert fitting.data_ptr() == place and waiting() == allocator.SMALL + 1
    del fitting
    # a small tensor comes from malloc and takes no block
    assert big(int(allocator.SMALL / allocator.SLACK) + 1).numel() < allocator.SMALL
    allocator.release()
    assert waiting() == 0


@settings(max_examples=30)
@given(
    st.lists(st.integers(allocator.SMALL, 3 * allocator.SMALL), min_size=5, max_size=40),
    st.integers(1, 6),
)
def test_pool_memory_is_bounded_by_the_peak_of_live_tensors(sizes, alive):
    """Allocate tensors of different sizes, `alive` of them at a time."""
    allocator.release()
    kept, most = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator, "SPARE", 0)
        for size in sizes:
            del kept[: max(0, len(kept) - alive + 1)]
            kept.append(big(size))
            most = max(most, sum(len(x) for x in kept))
            assert allocator._totals.allocated <= allocator.SLACK * most
    kept.clear()
    assert waiting() == allocator._totals.allocated


def test_fake_and_meta_tensors_bypass_the_pool():
    with FakeTensorMode():
        assert isinstance(big(), FakeTensor)
    assert allocator.empty((1 << 20,), torch.float32, torch.device("meta")).is_meta
    assert not allocator._totals.allocated


def test_threads_can_share_the_pool():
    sums = []

    def work(number: int) -> None:
        for _ in range(50):
            x = big().fill_(number)
            sums.append((x == number).all().item())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sums) == 200 and all(sums)


def test_training_mode_hides_older_objects_from_the_garbage_collector(monkeypatch):
    monkeypatch.setattr(runtime, "gc", collector := Mock())
    with pytest.raises(KeyError), runtime.training_mode(llama(), False):
        assert collector.mock_calls == [call.collect(), call.freeze()]
        raise KeyError
    assert collector.mock_calls == [call.collect(), call.freeze(), call.unfreeze()]


def test_training_mode_releases_the_pool():
    model = llama()
    with runtime.training_mode(model, False):
        del (x := [big()])[0]
        assert waiting() and not x
    assert not waiting()


def test_a_dequantised_weight_reuses_a_pooled_block():
    weight = quantize_nf4(torch.randn(1024, 512))
    before = dequantize_nf4(weight, torch.float32)
    place, values = before.data_ptr(), before.clone()
    del before
    again = dequantize_nf4(weight, torch.float32)
    assert again.data_ptr() == place and torch.equal(again, values)
