"""Removal of duplicates from a ranked list, round by round."""

from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_count, check_device, check_floating, check_shape
from vispress_kernels.distinct_select.reference import distinct_select_reference
from vispress_kernels.products import MOST_HELD

__all__ = ["distinct_select", "distinct_select_reference"]


def distinct_select(x: Tensor, num_keep: int, step: int, *, backend: Backend = "auto") -> Tensor:
    """Drop duplicates from a ranked list of tokens until `num_keep` are left, in its last order.

    A round drops, of the tokens at even places, those most similar to one at an odd place; the
    survivors go before the odd ones, the most similar first. Of equals the earlier counts as more
    similar; cosines within rounding of 1 are equal, NaN is below all. Cosines are held up to 4,096
    tokens, and the kernel takes all rounds in one launch, a program a list; beyond, each round
    compares in plain torch. Without a host sync; not differentiable.

    Args:
        x: Tokens by rank, the highest first, `[B, N, D]`, fp16, bf16, fp32 or fp64, any strides;
            cosines are in fp32.
        num_keep: Tokens to keep (K), in `[0, N]`.
        step: Tokens dropped a round at most, at least 1.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Places in the list, `[B, K]` int64.

    Raises:
        ValueError: `num_keep` or `step` is out of range.
        TypeError: `x` is not floating.
    """
    check_shape(x=(x, (None, None, None)))
    B, N, _ = x.shape
    check_count("num_keep", num_keep, 0, N)
    check_count("step", step, 1, 2**31 - 1)
    check_floating(x=x)
    check_device(x=x)
    x = x.detach()
    chosen = resolve_backend(backend, x)
    if chosen == "triton" and B and 0 < num_keep < N and N**2 <= MOST_HELD:
        from vispress_kernels.distinct_select.kernel import distinct_select_triton

        return distinct_select_triton(x, num_keep, step)
    return distinct_select_reference(x, num_keep, step)
