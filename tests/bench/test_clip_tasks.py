"""Tasks that show videos: what is asked, kept, shrunk, remembered and timed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vispress import compressed
from vispress.adapters.base import find_adapter
from vispress.analysis.inspect import open_prompt
from vispress.bench.model.batches import Memory, make_batches
from vispress.bench.model.loaded_model import load_named_model
from vispress.bench.page.exhibits import pictures_of
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.downsample import Downsample, smaller
from vispress.bench.plan.oracle import Oracle, choose_tokens, evidence_tokens, with_evidence
from vispress.bench.plan.plan import plan_from_mapping
from vispress.bench.run.applied_cell import apply_cell, check_cell
from vispress.bench.run.engine import run
from vispress.bench.tasks.task import EVIDENCE_GRID, Prompt, get_task
from vispress.bench.timing.cost import measure_cost, timed_batch
from vispress.bench.timing.replay import recorders, replays
from vispress.config import make_compressor
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.reference.world.words import CLIP_KINDS
from vispress.registry import get_method

VIDEO_METHODS = ("evs", "vidcom2", "dycoke", "prunevid", "fastvid", "holitom", "framefusion")
CELLS = EVIDENCE_GRID**2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from vispress.reference.model.checkpoint import export
    from vispress.reference.model.qwen import build_qwen, qwen_config

    folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
    export(build_qwen(qwen_config(vision_layers=3, text_layers=4), seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def qwen(folder):
    return load_named_model(str(folder))


@pytest.fixture(scope="module")
def prompts():
    return [*get_task("clip_order").draw(2, 0), *get_task("clip_change").draw(2, 0)]


@pytest.fixture(scope="module")
def inputs(qwen, prompts):
    return qwen.encode(prompts)


# --- tasks and subject


@pytest.mark.parametrize("name", CLIP_KINDS)
def test_prompts_show_a_video_and_know_its_evidence(name):
    task = get_task(name)
    assert task.shows == "videos"
    assert 0 < task.chance <= 0.5
    drawn = task.draw(3, 1)
    for prompt in drawn:
        assert prompt.images == ()
        assert prompt.visuals == len(prompt.videos) == len(prompt.evidence) == 1
        assert prompt.text.count("<video>") == 1
        assert prompt.videos[0].shape == (12, 96, 96, 3)
        assert prompt.evidence[0]
        assert all(0 <= cell < 12 * CELLS for cell in prompt.evidence[0])
    again = task.draw(3, 1)
    assert [p.text for p in again] == [p.text for p in drawn]
    assert (again[0].videos[0] == drawn[0].videos[0]).all()
    assert {get_task(kind).shows for kind in ("count", "order", "change")} == {"pictures"}


def test_models_without_videos_are_refused_before_a_run(subject, prompts, tmp_path, make_plan):
    with pytest.raises(ConfigError, match=r"asked about pictures alone.*'reference-qwen-clips'"):
        subject.encode(prompts)
    with pytest.raises(ConfigError, match="tasks that show videos"):
        run(make_plan(tasks=["count", "clip_order"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_for_videos_need_tasks_that_show_nothing_else(qwen):
    chain = (make_compressor("evs", keep_ratio=0.5),)
    with pytest.raises(UnsupportedMethodError, match=r"evs is made for videos.*: count, order"):
        check_cell(Cell(group="evs", chain=chain), qwen, None, pictures=["count", "order"])
    check_cell(Cell(group="evs", chain=chain), qwen, None, pictures=[])


def test_pictures_of_kept_tokens_are_for_pictures():
    with pytest.raises(ConfigError, match="shows a video"):
        open_prompt("scene:0", "clip_order")


# --- controls


def test_evidence_of_a_step_is_its_own():
    cells = [0, CELLS + 13, 5 * CELLS + 143]
    assert evidence_tokens(cells, (6, 12, 12)).nonzero()[:, 0].tolist() == cells
    # cell 1 spans parts of two tokens of 8
    found = evidence_tokens([2 * CELLS + 1], (6, 8, 8)).nonzero()[:, 0]
    assert found.tolist() == [128, 129]
    with pytest.raises(ConfigError, match=r"in \[0, 288\), got 288"):
        evidence_tokens([2 * CELLS], (2, 8, 8))


@pytest.mark.parametrize("num_keep", [1, 3, 6, 42, 85, 383])
def test_the_oracle_keeps_an_exact_count_and_evidence_first(num_keep):
    cells = [5, 2 * CELLS + 50, 2 * CELLS + 51]
    needed = set(evidence_tokens(cells, (6, 8, 8)).nonzero()[:, 0].tolist())
    keep = choose_tokens(cells, (6, 8, 8), num_keep).tolist()
    assert keep == sorted(set(keep))
    assert len(keep) == num_keep
    assert needed <= set(keep) if len(needed) <= num_keep else set(keep) <= needed
    if num_keep >= 42:  # what is left is spread over all steps
        assert {token // 64 for token in keep} == set(range(6))


def test_the_oracle_is_told_steps_of_frames(qwen, prompts, inputs):
    assert find_adapter(qwen.model).picture_grids("video", inputs) == [(6, 8, 8)] * 4
    method = with_evidence(Oracle(num_tokens=85), qwen.model, inputs, prompts)
    with compressed(qwen.model, method) as view, torch.no_grad():
        qwen.model(**inputs)
        kept = [sample.images[0].kept for sample in view.report.samples]
    for own, prompt in zip(kept, prompts, strict=True):
        (cells,) = prompt.evidence
        wanted = {
            step * 64 + token
            for step in range(6)
            for token in evidence_tokens(
                [c % CELLS for c in cells if c // CELLS // 2 == step], (1, 8, 8)
            )
            .nonzero()[:, 0]
            .tolist()
        }
        assert wanted <= set(own)
        assert len(own) == 85
    unknown = [replace(prompts[0], evidence=())]
    with pytest.raises(UnsupportedMethodError, match="does not say"):
        with_evidence(Oracle(num_tokens=85), qwen.model, inputs, unknown)


@pytest.mark.parametrize(("keep_ratio", "grid"), [(0.5, (6, 5, 6)), (0.111, (6, 2, 3))])
def test_smaller_frames_keep_every_step(qwen, prompts, inputs, keep_ratio, grid):
    made = smaller(Downsample(keep_ratio=keep_ratio), qwen, inputs, prompts)
    found = find_adapter(qwen.model).picture_grids("video", made.inputs)
    assert {tuple(sorted(own)) for own in found} == {tuple(sorted(grid))}
    tokens = int(np.prod(grid))
    assert tokens <= round(384 * keep_ratio)
    assert made.native == [384] * 4
    assert made.kept == [tokens] * 4
    assert len(qwen.converse(prompts, made.inputs, 2)) == 4


def test_whole_frames_are_the_uncompressed_model(qwen, prompts, inputs):
    made = smaller(Downsample(keep_ratio=1.0), qwen, inputs, prompts)
    assert all(torch.equal(made.inputs[name], inputs[name]) for name in inputs)


def test_less_than_a_token_a_step_is_refused(qwen, prompts, inputs):
    with pytest.raises(UnsupportedMethodError, match="5 tokens are less than one for each of 6"):
        smaller(Downsample(num_tokens=5), qwen, inputs, prompts)
    both = [replace(prompts[0], images=get_task("count").draw(1, 0)[0].images)]
    with pytest.raises(UnsupportedMethodError, match="not both"):
        smaller(Downsample(num_tokens=50), qwen, inputs, both)


# --- memory and cost


@pytest.mark.slow
def test_the_encoder_runs_once_for_all_cells(qwen, prompts):
    calls = []
    visual = qwen.model.model.visual
    handle = visual.register_forward_hook(lambda *_: calls.append(1))
    memory, (batch,) = Memory(qwen), make_batches(qwen, "clips", prompts, 4)
    try:
        alone = qwen.answer(prompts, 2)
        calls.clear()
        for method in (None, "evs", "fastv", None):
            chain = () if method is None else (make_compressor(method, keep_ratio=0.5),)
            with memory.shown(batch, anew=False) as shown:
                cell = Cell(group="x", chain=chain)
                with apply_cell(cell, qwen, prompts, shown) as now:
                    answers = [t[0] for t in qwen.converse(prompts, now.inputs, 2)]
            if method is None:
                assert answers == alone
                assert now.tokens == (4 * 384, 4 * 384)
        assert len(calls) == 1
    finally:
        handle.remove()


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("method", VIDEO_METHODS)
def test_a_replay_keeps_what_was_kept(qwen, method):
    """Also where rows of a batch keep other counts, and some are done before others."""
    chain = [make_compressor(method, keep_ratio=0.5)]
    shown = qwen.encode(timed_batch(qwen, get_task("clip_order").draw(4, 0), 4))
    recording, logs = recorders(chain)
    seen = []
    for chosen in (recording, replays(chain, logs)):
        with compressed(qwen.model, chosen) as view:
            for _ in range(1 if chosen is recording else 2):
                qwen.model.generate(**shown, max_new_tokens=1, do_sample=False)
            seen.append([sample.images[0] for sample in view.report.samples])
    own, replayed = seen
    for one, other in zip(own, replayed, strict=True):
        assert [p.kept for p in one.placements] == [p.kept for p in other.placements]


@pytest.mark.slow
def test_cost_is_measured_on_clips_of_one_length(qwen, prompts):
    timed = timed_batch(qwen, [*prompts, Prompt((), "how many stars ? :", "one")], 8)
    assert timed
    assert all(prompt.videos for prompt in timed)
    plan = plan_from_mapping(
        {
            "tasks": ["clip_order"],
            "methods": ["evs"],
            "keep_ratios": [0.5],
            "timing": {"batch": 2, "rounds": 2, "repeats": 1, "decode_tokens": 1},
        }
    )
    cost = measure_cost(qwen, [make_compressor("framefusion", keep_ratio=0.3)], timed, plan)
    assert cost["prompt_tokens"] > 384
    assert cost["kv_bytes"] < 0.6 * cost["uncompressed_kv_bytes"]


# --- a run


@pytest.mark.slow
def test_a_plan_runs_every_video_method_beside_controls(folder, tmp_path):
    plan = plan_from_mapping(
        {
            "model": str(folder),
            "tasks": list(CLIP_KINDS),
            "methods": [*VIDEO_METHODS, "fastv"],
            "keep_ratios": [0.5],
            "questions": 2,
            "batch_size": 2,
            "max_new_tokens": 1,
            "timing": {"batch": 0},
        }
    )
    run(plan, tmp_path)
    cells = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "cells").glob("*.json")}
    assert len(cells) == len(plan.cells())
    assert not [key for key, cell in cells.items() if "refused" in cell]
    for key, cell in cells.items():
        assert cell["kept"]["images"] == 4
        assert cell["kept"]["visual_tokens"] == 384
        group, ratio = cell["cell"]["group"], cell["kept"]["ratio_mean_over_layers"]
        grids = ("downsample", "avg_pool", "uniform")
        if key in ("none", "no_image"):
            assert ratio == (key == "none")
        elif group == "oracle" or (group not in grids and get_method(group).exact):
            assert ratio == pytest.approx(0.5, abs=0.01), key
        else:
            assert 0 < ratio < 0.51, key  # at most what was asked


def test_the_page_shows_every_step_of_a_clip(prompts):
    pictures = pictures_of(prompts[0], "x", None)
    assert len({picture.key for picture in pictures}) == 6
    assert len({picture.uri for picture in pictures}) == 6
    marked = [bool(picture.evidence) for picture in pictures]
    steps = {cell // CELLS // 2 for cell in prompts[0].evidence[0]}
    assert marked == [step in steps for step in range(6)]
