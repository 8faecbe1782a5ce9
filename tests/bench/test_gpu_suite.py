"""The GPU suite: a dry run on a CPU, what its files look like, resuming, and the time budget."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_suite
from benchmarks.gpu import shapes
from benchmarks.gpu.budgets import IMPORTANT, by_importance, fitting, published
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.forwards import Bench
from benchmarks.gpu.kernel_tests import _finishes, count
from benchmarks.gpu.record import Deadline, Part, Settings, quantiles, read_json, write_json
from benchmarks.gpu.selections import (
    cover_case,
    distinct_case,
    dpp_case,
    kmeans_case,
    maxmin_case,
)
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.targets import TARGETS
from torch.utils._pytree import tree_leaves

from vispress import compression_report, list_methods
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method
from vispress.types import Signal

CPU = torch.device("cpu")


class FakeClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def settings_in(folder: Path, **changes: Any) -> Settings:
    known: dict[str, Any] = {"identity": {"commit": "abc", "device": "cpu"}, "force": False}
    return Settings(CPU, folder, True, **(known | changes))


def part_in(folder: Path, clock: FakeClock | None = None, **changes: Any) -> Part:
    now = clock or FakeClock()
    return Part("models", settings_in(folder, **changes), Deadline(10.0, now))


# --- time


def test_a_deadline_passes_when_its_seconds_are_used() -> None:
    clock = FakeClock()
    deadline = Deadline(10.0, clock)
    assert (deadline.used, deadline.left, deadline.passed) == (0.0, 10.0, False)
    clock.time += 4
    assert (deadline.used, deadline.left, deadline.passed) == (4.0, 6.0, False)
    clock.time += 7
    assert (deadline.left, deadline.passed) == (0.0, True)


def test_rows_behind_the_deadline_are_named_and_the_part_is_not_complete(tmp_path: Path) -> None:
    clock = FakeClock()
    part = part_in(tmp_path, clock)
    assert part.row("one", lambda: {"x": 1}) is not None
    clock.time += 11
    assert part.row("two", lambda: pytest.fail("measured although the time was up")) is None
    assert part.row("one", lambda: pytest.fail("measured twice")) == part.rows[0]
    part.finish()
    data = read_json(part.path)
    assert data is not None
    assert (data["complete"], data["not_reached"]) == (False, ["two"])


def test_the_parts_together_stay_within_eight_minutes() -> None:
    assert sum(gpu_suite.BUDGETS.values()) <= gpu_suite.LIMIT < 8 * 60


# --- resuming


def test_a_part_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = part_in(tmp_path)
    first.row("good", lambda: {"x": 1})
    first.row("broken", lambda: {}["missing"])
    assert "KeyError" in first.rows[1]["error"]
    again = part_in(tmp_path)
    assert not again.complete
    assert [row["name"] for row in again.rows] == ["good"]
    again.row("broken", lambda: {"x": 2})
    again.finish()
    assert again.complete
    done = part_in(tmp_path)
    assert done.complete
    assert [row["x"] for row in done.rows] == [1, 2]


@pytest.mark.parametrize(
    "changes", [{"identity": {"commit": "other", "device": "cpu"}}, {"force": True}]
)
def test_another_commit_or_force_starts_anew(tmp_path: Path, changes: dict[str, Any]) -> None:
    part = part_in(tmp_path)
    part.row("one", lambda: {"x": 1})
    part.finish()
    again = part_in(tmp_path, **changes)
    assert not again.complete
    assert again.rows == []


def test_a_damaged_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text('{"part": "mod')
    assert part_in(tmp_path).rows == []
    write_json(tmp_path / "models.json", {"a": 1})
    assert read_json(tmp_path / "models.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["models.json"]


# --- counting


def test_memory_that_runs_out_is_a_row_and_no_failure(tmp_path: Path) -> None:
    def burst() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = part_in(tmp_path).row("large", burst)
    assert row is not None
    assert row["error"] == "out of memory"
    assert not gpu_suite.bad(row)


@pytest.mark.parametrize("row", [{"error": "x"}, {"ok": False}, {"status": "red"}])
def test_what_fails_the_run(row: dict[str, Any]) -> None:
    assert gpu_suite.bad(row)
    assert not gpu_suite.bad({"ok": True, "status": "green"})


def entry(name: str, outcome: str, number: int) -> dict[str, str]:
    return {"test": f"tests/kernels/test_{name}.py::t{number}", "outcome": outcome, "text": ""}


@pytest.mark.parametrize(
    ("outcomes", "collected", "status"),
    [
        (["passed"], 1, "green"),
        (["passed", "skipped"], 2, "green"),
        (["passed", "failed"], 2, "red"),
        (["missing"], 0, "unknown"),
        (["passed", "missing"], 2, "unknown"),
        (["skipped"], 1, "unknown"),
        ([], 3, "unknown"),
        (["passed"], 2, "unknown"),  # cut off
        (["failed"], 9, "red"),
    ],
)
def test_an_op_is_green_only_when_all_its_tests_ran(
    outcomes: list[str], collected: int, status: str
) -> None:
    file = "tests/kernels/test_merge_tokens.py"
    entries: list[dict[str, Any]] = [
        {"test": file, "outcome": "collected", "number": collected},
        *(entry("merge_tokens", outcome, i) for i, outcome in enumerate(outcomes)),
        entry("gather_tokens", "failed", 0),
    ]
    rows = count([*entries, *entries], ("merge_tokens",))  # workers repeat what the main one says
    assert [row["status"] for row in rows] == [status]


def test_an_outcome_never_gets_better() -> None:
    twice = [entry("merge_tokens", outcome, 0) for outcome in ("failed", "passed")]
    assert count(twice, ("merge_tokens",))[0]["status"] == "red"


def test_a_run_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"]
    assert not _finishes(sleep, dict(os.environ), tmp_path / "log", 1.0)
    assert _finishes([sys.executable, "-c", "pass"], dict(os.environ), tmp_path / "log", 30.0)


def test_quantiles_lie_between_the_values() -> None:
    spread = quantiles([4.0, 1.0, 3.0, 2.0, 5.0])
    assert spread == {"median": 3.0, "p20": pytest.approx(1.8), "p80": pytest.approx(4.2), "n": 5}
    with pytest.raises(ValueError, match="at least one"):
        quantiles([])


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--parts", "kernel"])
    assert "known: kernels,"[:6] in capsys.readouterr().err


def test_without_a_gpu_only_a_dry_run_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--all", "--out", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_a_part_that_breaks_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def runner(name: str) -> Any:
        def run(settings: Settings, deadline: Deadline) -> Part:
            if name == "laws":
                raise RuntimeError("no luck")
            return Part(name, settings, deadline)

        return run

    monkeypatch.setattr(gpu_suite, "_runner", runner)
    command = ["--parts", "laws,sweep", "--dry-run", "--out", str(tmp_path)]
    assert gpu_suite.main(command) == 1
    captured = capsys.readouterr()
    assert "no luck" in captured.err
    assert "== sweep" in captured.out


# --- what comes first, and what was missed


def test_important_methods_are_registered_and_come_first() -> None:
    assert set(IMPORTANT) <= set(list_methods())
    assert by_importance(["adsc", "dart", "avg_pool", "fastv"]) == [
        *("fastv", "dart", "adsc", "avg_pool")
    ]


def test_a_swept_rule_is_the_one_that_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.sweep import GRIDS, replaced

    from vispress_kernels import _greedy

    for op, grid in GRIDS.items():
        with replaced(op, grid[0]):  # an op without such a rule would raise
            pass
    x = torch.zeros(1, 9, 300)
    monkeypatch.setattr(_greedy, "together", lambda *_: 3)
    with replaced("dpp_select", {"BLOCK_N": 2}):
        assert _greedy.arrange(x)[1:] == ({"BLOCK_N": 2, "BLOCK_D": 512, "num_warps": 8}, 3, 2)
    assert _greedy.arrange(x)[1]["BLOCK_N"] == 8


def test_laws_run_where_a_method_fits_and_every_law_early() -> None:
    from benchmarks.gpu.laws import LAWS, _names
    from tests.laws.cases import MASKING, NO_BUDGET, VIDEO_ONLY

    names = _names("fp32", "llava", "pictures", dry=False)
    methods = {law: {n.split("/")[-1] for n in names if n.startswith(law)} for law in LAWS}
    assert [name.split("/")[0] for name in names[:5]] == list(LAWS)
    assert not {"dycoke", "globalcom2"} & methods["law1"]  # llava refuses them
    assert methods["law3"] - methods["law2"] == NO_BUDGET
    assert methods["law3"] - methods["law1"] == MASKING
    bf16 = _names("bf16", "llava", "pictures", dry=False)
    assert not [name for name in bf16 if name.startswith("law4")]
    assert not _names("fp32", "llava", "videos", dry=False)
    videos = _names("fp32", "qwen3_vl", "videos", dry=False)
    found = {(name.split("/")[0], name.split("/")[-1]) for name in videos}
    assert found == {(law, method) for law in LAWS for method in VIDEO_ONLY}


# --- the models


@pytest.mark.slow(cases=4)
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("llava_1_5_7b", 7.06), ("llava_next_7b", 7.06)),
        *(("qwen2_5_vl_7b", 8.29), ("qwen2_5_vl_7b_video", 8.29)),
    ],
)
def test_shapes_have_as_many_parameters_as_the_checkpoints(name: str, billions: float) -> None:
    model = shapes.build(shapes.SHAPES[name], torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def narrow(name: str, layers: int) -> shapes.Shape:
    """The true geometry (images, patches, crops, tokens) at small widths."""
    shape = shapes.SHAPES[name]
    small = {"hidden_size": 32, "intermediate_size": 32}
    text = shape.text | small | {"num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"vocab_size": 64, "num_hidden_layers": layers}
    vision = shape.vision | small
    if shape.family == "qwen2_5_vl":
        text["rope_parameters"] = shape.text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    else:
        vision |= {"num_attention_heads": 2, "num_hidden_layers": 3}
    return replace(shape, text=text, vision=vision)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_prompts_hold_as_many_placeholders_as_the_encoder_gives_tokens(name: str) -> None:
    """Transformers refuses a prompt whose count is off."""
    shape = narrow(name, 1)
    if shape.frames:  # a whole one is long
        assert shape.frames * (shape.image // 2) ** 2 == shape.visual
        shape = shapes.TINY_SHAPES[name]
    model = shapes.build(shape, CPU, torch.float32)
    inputs = shapes.prompt(shape, 2, CPU, torch.float32)
    placeholder = shapes.VIDEO_ID if shape.frames else shapes.IMAGE_ID
    assert int((inputs["input_ids"] == placeholder).sum()) == 2 * shape.visual
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.shape == (2, 1, shape.text["vocab_size"])
    assert logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in shapes.SHAPES.items() if not s.frames])
def test_every_method_runs_at_its_published_budget(name: str) -> None:
    shape = narrow(name, 8)
    bench = Bench(shape, CPU, torch.float32)
    inputs = shapes.prompt(shape, 1, CPU, torch.float32)
    layers = bench._prefill(inputs).past_key_values.layers
    whole = sum(x.numel() * x.element_size() for a in layers for x in (a.keys, a.values))
    methods = fitting(shape.crops)
    if shape.crops > 1:  # five times the tokens: those that see crops, the others run on one
        methods = [m for m in methods if Signal.CROPS in get_method(m).reads]
    assert len(methods) > 5
    for method in methods:
        options = published(method, shape.visual, has_cls=bench.has_cls)
        with bench._as("compressed", options):
            bench._prefill(inputs)
            facts = bench._facts(inputs, compression_report(bench.model))
        if issubclass(get_method(method), PairMasker | CacheEvictor | GistEvictor):
            # drop nothing in a prefill
            assert facts["kept_at_last_layer"] == shape.visual
            continue
        # what bypasses a layer may be back in the last one
        most = shape.visual if get_method(method).gates else shape.visual - 1
        assert 0 <= facts["kept_at_last_layer"] <= most, method
        assert facts["kv_bytes"] < whole, method


# --- the dry run


@pytest.mark.full  # and in CI
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without CUDA only")
def test_a_dry_run_writes_every_part_and_a_second_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    command = ["--all", "--dry-run", "--out", str(tmp_path)]
    assert gpu_suite.main(command) == 0, capsys.readouterr().out
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    summary = parts.pop("summary")
    assert [entry["target"] for entry in summary["targets"]] == [t.name for t in TARGETS]
    assert {name: state["errors"] for name, state in summary["parts"].items()} == dict.fromkeys(
        gpu_suite.BUDGETS, 0
    )
    assert set(parts) == set(gpu_suite.BUDGETS)
    for name, data in parts.items():
        assert data["part"] == name
        assert data["complete"], data["not_reached"]
        assert {"commit", "source", "device", "versions"} <= set(data["identity"])
        assert data["rows"]
        assert not [row for row in data["rows"] if "error" in row]
    check_shapes(parts)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert gpu_suite.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == written


def test_a_greedy_selection_need_not_read_more_than_one_product_and_its_rows() -> None:
    size, meta = SIZES["llava_next"], torch.device("meta")
    cases = [make(size, meta) for make in (maxmin_case, dpp_case)]
    tokens, row, product = 2 * 2880 * 4096, 4 * 2880, 2 * 2880**2 * 4096
    assert [case.flops for case in cases if case] == [product, product]
    rows, columns = 320, 320**2 // 2
    assert [case.bytes - tokens for case in cases if case] == [row * rows, row * (rows + columns)]


def test_selections_that_hold_all_cosines_have_a_floor_and_a_limit() -> None:
    size, meta = SIZES["llava_next"], torch.device("meta")
    tokens, product = 2 * 2880 * 4096, 2 * 2880**2 * 4096
    floors = {cover_case: 4 * 2880 * 320, kmeans_case: 4 * 2880 * 320, distinct_case: 2880**2}
    for make, beside in floors.items():
        case = make(size, meta)
        assert case is not None
        assert (case.bytes - tokens, case.flops) == (beside, product)
        assert make(SIZES["qwen_16384"], meta) is None


@pytest.mark.parametrize("op", ["cover_select", "distinct_select", "kmeans_starts"])
def test_a_compiled_selection_takes_what_the_reference_does(op: str) -> None:
    torch.manual_seed(0)
    case = CASES[op](replace(SIZES["llava15"], N=48, D=32), CPU)
    assert case is not None
    assert case.compiled is not None
    for mine, theirs in zip(
        tree_leaves(case.compiled("eager")()), tree_leaves(case.reference()), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def check_shapes(parts: dict[str, Any]) -> None:
    """Keys that readers of the files rely on."""
    spread = {"median", "p20", "p80", "n"}
    for row in parts["bandwidth"]["rows"]:
        assert set(row["kernel_ms"]) == spread
        assert row["floor_ms"] > 0
        speedups = [key for key in row if key.startswith("speedup")]
        assert bool(speedups) == row["green"]  # nothing is claimed for an op that was not tested
    check_models(parts["models"]["rows"])
    check_captured(parts["captured"]["rows"])
    assert all(row["ok"] for row in parts["laws"]["rows"])
    assert set(parts["laws"]["extra"]["held_and_broken"]) == {f"law{n}" for n in range(1, 6)}
    for row in parts["sweep"]["rows"]:
        assert set(row["default_ms"]) == spread
        assert all("rule" in tried for tried in row["tried"])


def check_captured(rows: list[dict[str, Any]]) -> None:
    """A row a shape; all that was timed ran from graphs (a CPU's tape)."""
    assert len(rows) == len(shapes.TINY_SHAPES)
    for row in rows:
        assert row["captured_prefill_speedup"] > 0
        assert row["captured_step_speedup"] > 0
        for variant in ("uncompressed", "compressed", "text", "whole_text"):
            captured = row[variant]["captured"]
            assert captured["graphs"] > 0
            assert captured["fallbacks"] == {}, variant


def test_shares_leave_out_what_the_encoder_takes() -> None:
    from benchmarks.gpu.captures import speeds

    def times(ttft: float, step: float = 1.0) -> dict[str, Any]:
        return {"captured": {"ttft_ms": {"median": ttft}, "step_ms": {"median": step}}}

    found = {"uncompressed": times(30, 2), "whole_text": times(20), "text": times(4)}
    assert speeds(found | {"compressed": times(15, 1)}) == {
        "captured_encoder_ms": 10,
        "captured_ttft_speedup": 2,
        "captured_prefill_speedup": 4,
        "captured_share_of_that_length": 0.8,
        "captured_choosing_share": 0.05,
        "captured_step_speedup": 2,
    }


def check_models(rows: list[dict[str, Any]]) -> None:
    """A row uncompressed, and those of the methods, which refer to it."""
    whole = {row["name"]: row for row in rows if row["method"] == "uncompressed"}
    assert len(whole) == len(shapes.TINY_SHAPES)
    for row in whole.values():
        assert isinstance(row["launch_bound"], bool)
        assert set(row["decode_ms_per_token"]) == {"uncompressed"}
    for row in rows:
        if row["name"] in whole:
            continue
        assert row["uncompressed_kv_bytes"] == whole[row["against"]]["uncompressed_kv_bytes"]
        for times in ("ttft_ms", "prefill_ms", "host_ms", "host_prefill_ms"):
            assert set(row[times]) == {"uncompressed", "compressed", "text"}
            assert all(spread["n"] >= 5 for spread in row[times].values())
        assert set(row["decode_ms_per_token"]) == {"compressed"}
        assert 0 < row["kv_bytes"] < row["uncompressed_kv_bytes"]
        assert row["just_that_length"] < row["sequence"]
