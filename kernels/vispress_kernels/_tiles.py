"""Products of tiles, for the kernels that form them. Imported by those only: imports triton."""

import triton
import triton.language as tl


@triton.jit
def in_groups(place, rows, columns, GROUP: tl.constexpr):
    """Block row and block column of a place: neighbours share GROUP rows and some columns."""
    begin = place // (GROUP * columns) * GROUP
    height = tl.minimum(rows - begin, GROUP)
    rest = place % (GROUP * columns)
    return begin + rest % height, rest // height


@triton.jit
def product_of_tiles(
    p_a,  # [M, K], the first K elements of each row
    p_b,  # [K, N], likewise
    step_a,
    step_b,
    o_k,  # [K] from 0
    width,
    product,  # [M, N] fp32, what is added to
    EVEN: tl.constexpr,  # K divides `width`
    K: tl.constexpr,
):
    """Products of rows and columns of `width` elements, K of them at a time."""
    for start in range(0, width, K):
        if EVEN:
            a, b = tl.load(p_a), tl.load(p_b)
        else:
            m_k = o_k < width - start
            a = tl.load(p_a, mask=m_k[None, :], other=0.0)
            b = tl.load(p_b, mask=m_k[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision="tf32x3")
        p_a += step_a
        p_b += step_b
    return product
