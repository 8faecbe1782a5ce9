"""Cost of a row of the table: measurements of its cells, averaged over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vispress.bench.results.stats import Quantiles


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Times of a batch in milliseconds; every `..._ratio` is over the uncompressed model's.

    Args:
        encoder_ms: Vision encoder and projector.
        encoder_ratio: Of it.
        prefill_ms: Language model, up to the first token.
        prefill_ratio: Of it.
        ttft_ms: From pixel values to the first token.
        ttft_ratio: Of it.
        decode_ms: Each later token; None where none was generated.
        decode_ratio: Of it.
        overhead_ms: What choosing costs: the method less a replay of what it kept; None for the
            uncompressed model. Noise can make it negative.
        overhead_share: Of the uncompressed prefill.
        kv_bytes: Keys and values of a prompt after its prefill.
        kv_ratio: Of them.
        peak_bytes: Most bytes in use up to the first token of a batch, beyond weights and inputs.
        peak_ratio: Of them.
        flops: Prefill FLOPs of a prompt's visual tokens, by convention.
        flops_ratio: Of them.
    """

    encoder_ms: Quantiles
    encoder_ratio: Quantiles
    prefill_ms: Quantiles
    prefill_ratio: Quantiles
    ttft_ms: Quantiles
    ttft_ratio: Quantiles
    decode_ms: Quantiles | None
    decode_ratio: Quantiles | None
    overhead_ms: Quantiles | None
    overhead_share: Quantiles | None
    kv_bytes: float
    kv_ratio: float
    peak_bytes: float
    peak_ratio: float
    flops: Mapping[str, float]
    flops_ratio: Mapping[str, float]


_SPREADS = (
    "encoder_ms", "encoder_ratio", "prefill_ms", "prefill_ratio", "ttft_ms", "ttft_ratio",
    "decode_ms", "decode_ratio", "overhead_ms", "overhead_share",
)  # fmt: skip

CSV_COLUMNS = (
    *(f"{name}{end}" for name in _SPREADS for end in ("", "_p20", "_p80")),
    "kv_ratio", "kv_bytes", "peak_ratio", "peak_bytes",
    "flops_mac3", "flops_flop3", "flops_fastv2", "flops_ratio_mac3",
)  # fmt: skip


def cost_of(cells: Sequence[Mapping[str, Any]]) -> Cost | None:
    """Average the cost of a group's seeds; None where nothing was timed.

    Args:
        cells: Finished cells, as stored.
    """
    costs = [cell["cost"] for cell in cells if "cost" in cell]
    if not costs:
        return None

    def ratio(name: str) -> float:
        return fmean(cost[name] / cost[f"uncompressed_{name}"] for cost in costs)

    conventions = costs[0]["flops"]
    by_convention = {
        key: {name: fmean(cost["flops"][name][key] for cost in costs) for name in conventions}
        for key in ("compressed", "ratio")
    }
    spreads: dict[str, Any] = {name: _spread([cost[name] for cost in costs]) for name in _SPREADS}
    return Cost(
        **spreads,
        kv_bytes=fmean(cost["kv_bytes"] for cost in costs),
        kv_ratio=ratio("kv_bytes"),
        peak_bytes=fmean(cost["peak_bytes"] for cost in costs),
        peak_ratio=ratio("peak_bytes"),
        flops=by_convention["compressed"],
        flops_ratio=by_convention["ratio"],
    )


def csv_cells(cost: Cost | None) -> dict[str, float]:
    """Fill `CSV_COLUMNS`; nothing where nothing was timed."""
    if cost is None:
        return {}
    cells: dict[str, float] = {}
    for name in _SPREADS:
        spread: Quantiles | None = getattr(cost, name)
        if spread is not None:
            cells |= {
                name: spread.median,
                f"{name}_p20": spread.p20,
                f"{name}_p80": spread.p80,
            }
    numbers = ("kv_ratio", "kv_bytes", "peak_ratio", "peak_bytes")
    cells |= {name: getattr(cost, name) for name in numbers}
    cells |= {f"flops_{name}": value for name, value in cost.flops.items()}
    return cells | {"flops_ratio_mac3": cost.flops_ratio["mac3"]}


def _spread(measured: Sequence[Mapping[str, float] | None]) -> Quantiles | None:
    """Average the spreads of several seeds."""
    spreads = [spread for spread in measured if spread is not None]
    if not spreads:
        return None
    p20, median, p80 = (
        fmean(spread[name] for spread in spreads) for name in ("p20", "median", "p80")
    )
    return Quantiles(p20, median, p80)
