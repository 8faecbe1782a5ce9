"""Cost of table rows: seeds averaged, ratios kept, what was not measured left out."""

import io

from rich.console import Console

from vispress.bench.results.cost_rows import CSV_COLUMNS, cost_of, csv_cells
from vispress.bench.results.cost_table import cost_table


def spread(value):
    return {"p20": value - 1, "median": value, "p80": value + 1}


def cell(scale=1.0, **changes):
    times = {
        f"{name}_{unit}": spread(scale * value)
        for number, name in enumerate(("encoder", "prefill", "ttft", "decode", "overhead"))
        for unit, value in (("ms", 10.0 + number), ("ratio", 20.0 + number))
    }
    times["overhead_share"] = times.pop("overhead_ratio")
    sizes = {
        "kv_bytes": 1024 * scale, "uncompressed_kv_bytes": 4096,
        "peak_bytes": 2**20 * scale, "uncompressed_peak_bytes": 2**22,
    }  # fmt: skip
    flops = {
        name: {"compressed": 1e9 * scale, "uncompressed": 4e9, "ratio": 0.25 * scale}
        for name in ("mac3", "flop3", "fastv2")
    }
    return {"cost": times | sizes | {"flops": flops} | changes}


def shown(cost):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(cost_table([("a method", cost)], 4))
    return console.export_text()


def test_seeds_are_averaged():
    cost = cost_of([cell(1.0), cell(3.0)])
    assert (cost.prefill_ms.p20, cost.prefill_ms.median, cost.prefill_ms.p80) == (21, 22, 23)
    assert cost.overhead_share.median == 48
    assert cost.kv_bytes == 2048
    assert cost.kv_ratio == 0.5
    assert cost.peak_ratio == 0.5
    assert cost.flops["mac3"] == 2e9
    assert cost.flops_ratio["flop3"] == 0.5


def test_nothing_timed_is_no_cost():
    assert cost_of([{}, {"refused": "why"}]) is None
    assert csv_cells(None) == {}


def test_csv_cells_fit_the_columns():
    assert set(csv_cells(cost_of([cell()]))) == set(CSV_COLUMNS)
    plain = cost_of([cell(overhead_ms=None, overhead_share=None, decode_ms=None)])
    assert set(CSV_COLUMNS) - set(csv_cells(plain)) == {
        f"{name}{end}"
        for name in ("overhead_ms", "overhead_share", "decode_ms")
        for end in ("", "_p20", "_p80")
    }
    assert csv_cells(plain)["prefill_ms_p80"] == 12


def test_the_table_shows_milliseconds_over_ratios():
    text = shown(cost_of([cell()]))
    for words in (
        "a batch of 4", "12.00", "22.00 (21.00-23.00)", "13.00", "14.00", "2400.0 (2300.0 to",
        "1.0", "0.25",
    ):  # fmt: skip
        assert words in text
    assert "2400.0" not in shown(cost_of([cell(overhead_ms=None, overhead_share=None)]))
