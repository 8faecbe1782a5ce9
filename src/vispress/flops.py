"""Analytic cost of a prefill in the decoder layers, as published tables count it.

FLOPs come in three conventions. Per layer with n tokens, width d and MLP width m:

* `mac3`: 4nd^2 + 2n^2 d + 3ndm, a multiply-add counts one, SwiGLU as three products
  (TransPrune, PyramidDrop).
* `flop3`: twice that (GlobalCom2, CDPruner, FasterVLM, YOPO).
* `fastv2`: 4nd^2 + 2n^2 d + 2ndm, SwiGLU as two products (FastV, PruneVid, HoliTom).

All three count `4nd^2` also where several query heads share keys (GQA), as the papers do. Tables
mostly count visual tokens alone; embeddings, vision encoder, projector and LM head are left out.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vispress.checks import check_choice
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from vispress.types import Placement

CONVENTIONS = ("mac3", "flop3", "fastv2")

HIDING = ("pre_llm", "in_llm", "skip")
"""Stages whose placements keep rows from decoder layers in a prefill."""


def flops(
    tokens_per_layer: Sequence[int],
    width: int,
    mlp_width: int,
    convention: str = "mac3",
    *,
    mlp_shares: Sequence[float] | None = None,
    head_shares: Sequence[float] | None = None,
) -> float:
    """Sum over decoder layers.

    Args:
        tokens_per_layer: Tokens that enter each decoder layer.
        width: LLM hidden size (d).
        mlp_width: LLM MLP size (m).
        convention: One of `CONVENTIONS`.
        mlp_shares: Share of the MLP's neurons that they go through in each layer; None for all.
        head_shares: Share of the attention heads that they have a part in, likewise: counted as if
            the others' projections and products were left out.

    Returns:
        FLOPs, or multiply-adds where the convention counts those.

    Raises:
        ConfigError: Unknown convention, a negative count, or shares of another number of layers.
    """
    check_choice("convention", convention, CONVENTIONS)
    _check_counts(tokens_per_layer)
    products = 2 if convention == "fastv2" else 3
    mlps = _shares("mlp_shares", mlp_shares, len(tokens_per_layer))
    heads = _shares("head_shares", head_shares, len(tokens_per_layer))
    total = sum(
        head * (4 * n * width**2 + 2 * n**2 * width) + mlp * products * n * width * mlp_width
        for n, head, mlp in zip(tokens_per_layer, heads, mlps, strict=True)
    )
    return float(total * (2 if convention == "flop3" else 1))


def average_tokens(tokens_per_layer: Sequence[int]) -> float:
    """Mean over decoder layers, the "average tokens" of published tables.

    Raises:
        ConfigError: There is no layer, or a negative count.
    """
    _check_counts(tokens_per_layer)
    if not tokens_per_layer:
        raise ConfigError("average tokens need at least one decoder layer, got none")
    return sum(tokens_per_layer) / len(tokens_per_layer)


def kv_bytes(tokens_per_layer: Sequence[int], kv_width: int, itemsize: int = 2) -> int:
    """Bytes of keys and values.

    Args:
        tokens_per_layer: Tokens that each decoder layer stores.
        kv_width: Key-value heads times head size.
        itemsize: Bytes a number, 2 for fp16 and bf16.

    Raises:
        ConfigError: A negative count.
    """
    _check_counts(tokens_per_layer)
    return 2 * sum(tokens_per_layer) * kv_width * itemsize


def visual_per_layer(
    num_visual: int, num_layers: int, *chain: Sequence["Placement"], last: bool = True
) -> tuple[int, ...]:
    """Count the visual tokens of one image that enter each decoder layer in a prefill.

    Args:
        num_visual: Visual tokens of the image.
        num_layers: Decoder layers.
        *chain: Placements of each compressor, in the order of the chain.
        last: Whether it is the last image of its prompt, as a lone one is; placements on the
            earlier images pass it, or those on the last one do.

    Returns:
        A count for each layer. Placements that hide nothing in a prefill (in the encoder, on pairs,
        while decoding) do not show; rows that bypass layers are missing there and counted again
        behind them.

    Raises:
        ConfigError: A count is out of range.
    """
    if num_layers < 1:
        raise ConfigError(f"num_layers must be at least 1, got {num_layers}")
    counts = [num_visual] * num_layers
    left = num_visual
    for placements in chain:
        reached = left
        for placement in placements:
            passes = placement.images == ("earlier" if last else "last")
            if passes or placement.stage not in HIDING:
                continue
            count = min(left, placement.budget.resolve(reached))
            # what bypasses comes back as it was: later placements and layers have it again
            end = num_layers if placement.until is None else placement.until
            counts[placement.layer : end] = [count] * (end - placement.layer)
            if placement.until is None:
                left = count
    _check_counts(counts)
    return tuple(counts)


def _shares(name: str, given: Sequence[float] | None, layers: int) -> Sequence[float]:
    if given is None:
        return [1.0] * layers
    if len(given) != layers:
        raise ConfigError(f"{name} must be one a layer, got {len(given)} for {layers} layers")
    return given


def _check_counts(tokens_per_layer: Sequence[int]) -> None:
    if (worst := min(tokens_per_layer, default=0)) < 0:
        raise ConfigError(f"tokens a layer must be at least 0, got {worst}")
