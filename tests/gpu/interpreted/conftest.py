"""Check, in every test of this folder, that a kernel accesses only the memory of its arguments."""

import numpy as np
import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def inside(monkeypatch) -> None:
    """Assert that all addresses of a load or store are in one tensor of the launch's arguments.

    A read past the end changes no result and raises no error in the interpreter. On a GPU it may be
    an illegal memory access.
    """
    extents: list[tuple[int, int]] = []
    convert, builder = interpreter._implicit_cvt, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    launch = interpreter.GridExecutor.__call__

    def launched(self, *arguments, **options):
        extents.clear()
        return launch(self, *arguments, **options)

    def noted(argument):
        if hasattr(argument, "data_ptr") and argument.numel():
            last = sum(
                (size - 1) * stride
                for size, stride in zip(argument.shape, argument.stride(), strict=True)
            )
            start = argument.data_ptr()
            extents.append((start, start + (last + 1) * argument.element_size()))
        return convert(argument)

    def check(pointers, mask) -> None:
        touched = np.broadcast_to(
            pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        )
        touched = touched[np.broadcast_to(mask.data, touched.shape).astype(bool)]
        if len(touched):
            first, end = (
                int(touched.min()),
                int(touched.max()) + pointers.get_element_ty().primitive_bitwidth // 8,
            )
            assert any(start <= first and end <= stop for start, stop in extents), (
                "access outside of the arguments"
            )

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter, "_implicit_cvt", noted)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
