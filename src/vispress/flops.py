"""Analytic prefill cost of decoder layers, in the three conventions of published tables.

Per layer with n tokens, width d and MLP width m:

* `mac3`: 4nd^2 + 2n^2 d + 3ndm, a multiply-add counts one, SwiGLU as three products
  (TransPrune, PyramidDrop).
* `flop3`: twice that (GlobalCom2, CDPruner, FasterVLM).
* `fastv2`: 4nd^2 + 2n^2 d + 2ndm, SwiGLU as two products (FastV, PruneVid, HoliTom).
"""

from collections.abc import Sequence

CONVENTIONS = ("mac3", "flop3", "fastv2")


def flops(
    tokens_per_layer: Sequence[int], width: int, mlp_width: int, convention: str = "mac3"
) -> float:
    """Sum over decoder layers.

    Args:
        tokens_per_layer: Tokens that enter each decoder layer.
        width: LLM hidden size (d).
        mlp_width: LLM MLP size (m).
        convention: One of `CONVENTIONS`.

    Raises:
        ValueError: Unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    products = 2 if convention == "fastv2" else 3
    total = sum(
        4 * n * width**2 + 2 * n**2 * width + products * n * width * mlp_width
        for n in tokens_per_layer
    )
    return float(total * (2 if convention == "flop3" else 1))
