"""Elements more than 2**31 away: strides fit 32 bits, their products with an index do not.

The buffers are a file's holes (or device memory), so nothing of their size is read or written. That
no other address is made from a 32-bit product, those of outputs included, is seen in the compiler's
own representation (`test_compile.py`).
"""

import numpy as np
import pytest
import torch
from tests.kernels.op_cases import OPS, make

pytest.importorskip("triton")

FAR = 2**31
MOVED = ("x", "y", "targets", "q", "k", "w2", "keep", "valid")


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    """`2**31` elements and some, of which hardly any exist."""
    count = FAR + 2**20
    if torch.cuda.is_available():
        yield torch.empty(count, dtype=torch.float16, device="cuda")
        return
    path = tmp_path_factory.mktemp("holes") / "buffer"
    file = np.memmap(path, dtype=np.float16, mode="w+", shape=count)
    yield torch.from_numpy(file)
    del file
    path.unlink()


def far(x, axis, buffer):
    """The same values, the last of them along one axis `2**31` elements from the first."""
    step = -(-FAR // (x.shape[axis] - 1))
    assert step < FAR
    strides = list(torch.empty(x.shape, device="meta").stride())
    dense = [s if a < axis % x.dim() else s // x.shape[axis] for a, s in enumerate(strides)]
    dense = [strides[a] if a > axis % x.dim() else dense[a] for a in range(x.dim())]
    dense[axis] = step
    view = buffer.as_strided(x.shape, dense)
    view.copy_(x)
    return view


@pytest.mark.parametrize("axis", [0, -2, -1])
@pytest.mark.parametrize("op", OPS)
def test_far_elements_are_found(randn, holes, op, axis):
    case = make(op, randn, 3, 5, 3, 16, torch.float16)
    near = case.run("triton")
    for name, tensor in case.tensors.items():
        moves = tensor.dtype == torch.float16 and tensor.dim() > 2 - (axis != 0)
        if name not in MOVED or not moves or tensor.shape[axis] < 3:
            continue
        moved = type(case)(case.tensors | {name: far(tensor, axis, holes)}, case.call)
        for a, b in zip(near, moved.run("triton"), strict=True):
            torch.testing.assert_close(a, b)
