"""The cost table that `vispress bench` prints."""

from collections.abc import Sequence

from rich.text import Text

from vispress.bench.results.cost_rows import Cost
from vispress.bench.results.sheet import Sheet
from vispress.bench.results.stats import Quantiles

_COLUMNS = (
    "TTFT", "encoder", "prefill", "choosing", "decode, a token", "peak MiB", "KV KiB", "GMAC",
)  # fmt: skip


def cost_table(rows: Sequence[tuple[str, Cost]], batch: int) -> Sheet:
    """Make the table of times and sizes; below each its ratio to the uncompressed model's.

    Args:
        rows: Names and costs.
        batch: Prompts in the timed batch, at most.
    """
    table = Sheet(
        title=f"cost: milliseconds of a batch of {batch}, below x uncompressed (p20-p80)",
        caption="TTFT: from pixels to the first token = encoder (with projector) + prefill and a "
        "little between; choosing: the method less a replay of what it kept, below in % of the "
        "uncompressed prefill; peak: of the batch up to its first token, beyond weights and "
        "inputs; KV and GMAC (visual tokens, 3-matrix MLP): of a prompt",
        columns=("method", *_COLUMNS),
    )
    for name, cost in rows:
        table.add_row(
            name,
            _times(cost.ttft_ms, cost.ttft_ratio),
            _times(cost.encoder_ms, cost.encoder_ratio),
            _times(cost.prefill_ms, cost.prefill_ratio),
            _choosing(cost),
            _times(cost.decode_ms, cost.decode_ratio),
            _stacked(f"{cost.peak_bytes / 2**20:.1f}", f"{cost.peak_ratio:.2f}"),
            _stacked(f"{cost.kv_bytes / 2**10:.0f}", f"{cost.kv_ratio:.2f}"),
            _stacked(f"{cost.flops['mac3'] / 1e9:.3g}", f"{cost.flops_ratio['mac3']:.2f}"),
        )
    return table


def _times(spent: Quantiles | None, ratio: Quantiles | None) -> Text:
    if spent is None or ratio is None:
        return Text("")
    below = f"{ratio.median:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"
    return _stacked(f"{spent.median:.2f}", below)


def _choosing(cost: Cost) -> Text:
    spent, share = cost.overhead_ms, cost.overhead_share
    if spent is None or share is None:
        return Text("")
    low, middle, high = (100 * value for value in (share.p20, share.median, share.p80))
    return _stacked(f"{spent.median:.2f}", f"{middle:.1f} ({low:.1f} to {high:.1f})")


def _stacked(value: str, below: str) -> Text:
    return Text(f"{value}\n").append(below, style="dim")
