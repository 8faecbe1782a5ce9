"""The one budget of a chain: solved on shares of an image, met by models, refused with reasons."""

import pytest
import torch

from tests.laws.cases import inputs_of, model_of
from vispress import compress_model, compression_report, remove_compression
from vispress.chain import Chain, chain_mean, share_mean
from vispress.config import from_mapping, load_config
from vispress.errors import BudgetError, ConfigError
from vispress.flops import visual_per_layer
from vispress.methods import (
    CATP,
    LVLMCSP,
    VTW,
    Debias,
    DivPrune,
    FastV,
    MaxNorm,
    PyramidDrop,
    SparseVLM,
    VisionZip,
)


def test_the_mean_of_a_chain_counts_each_part_on_what_the_one_before_left():
    # 1/2 from the start; half of it from layer 8 on: (8 * .5 + 24 * .25) / 32
    chain = [DivPrune(keep_ratio=0.5), FastV(keep_ratio=0.5, layer=8)]
    assert chain_mean(chain, 32) == pytest.approx(0.3125)
    assert chain_mean([PyramidDrop()], 32) == pytest.approx((8 + 4 + 2 + 1) / 32)
    assert chain_mean([DivPrune(keep_ratio=0.5), VTW()], 32) == pytest.approx(0.5 * 15 / 32)


def test_tokens_that_bypass_layers_count_again_behind_them():
    # a third runs in layers 0 to 7 and from 16 on, all of them between
    assert chain_mean([LVLMCSP(keep_ratio=0.5)], 32) == pytest.approx(0.5)
    assert chain_mean([LVLMCSP()], 32) == pytest.approx((8 / 8 + 8 + 16 / 8) / 32)
    assert chain_mean([DivPrune(keep_ratio=0.5), LVLMCSP(keep_ratio=0.5)], 32) == pytest.approx(
        0.25
    )
    (solved,), _ = share_mean([LVLMCSP()], 0.4, 32)
    assert solved.keep_ratio == pytest.approx(0.4)


def test_an_image_counts_as_the_last_of_its_prompt():
    # the placement on demonstrations passes it
    assert chain_mean([CATP(keep_ratio=0.5)], 32) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "chain",
    [
        [LVLMCSP(keep_ratio=0.6)],
        [LVLMCSP(num_tokens=3, layers=(2, 4))],
        [DivPrune(keep_ratio=0.5), LVLMCSP(ratio=0.3, layers=(2, 3)), FastV(num_tokens=2, layer=5)],
        [CATP(keep_ratio=0.6)],
    ],
    ids=lambda chain: "+".join(part.name for part in chain),
)
def test_counts_and_flops_are_those_of_a_compressed_model(chain):
    model, inputs = model_of("llava"), inputs_of("llava")
    compress_model(model, chain)
    try:
        with torch.no_grad():
            model(**inputs)
        report = compression_report(model)
    finally:
        remove_compression(model)
    placements = [part.placements(report.num_layers) for part in chain]
    for b, sample in enumerate(report.samples):
        counts = [
            visual_per_layer(
                image.num_visual,
                report.num_layers,
                *placements,
                last=image is sample.images[-1],
            )
            for image in sample.images
        ]
        expected = [sum(layer) for layer in zip(*counts, strict=True)]
        if expected:
            assert [layer[b] for layer in report.visual_per_layer] == expected


@pytest.mark.parametrize("mean", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize(
    "chain",
    [
        [DivPrune(), FastV()],
        [VisionZip(), Debias()],
        [DivPrune(keep_ratio=0.9), MaxNorm(), FastV()],
        [DivPrune(keep_ratio=1.0), MaxNorm()],
    ],
    ids=lambda chain: "+".join(p.name for p in chain) if isinstance(chain, list) else chain,
)
def test_open_parts_get_the_ratio_that_gives_the_mean(chain, mean):
    if mean > chain_mean([p for p in chain if p.keep_ratio is not None], 32):
        with pytest.raises(BudgetError, match=r"alone leave 0.900"):
            share_mean(chain, mean, 32)
        return
    solved, note = share_mean(chain, mean, 32)
    assert chain_mean(solved, 32) == pytest.approx(mean, abs=1e-6)
    shared = {
        p.keep_ratio for p, asked in zip(solved, chain, strict=True) if not asked.given_budget()
    }
    assert len(shared) == 1
    for part, asked in zip(solved, chain, strict=True):
        if asked.given_budget():
            assert part == asked
    assert f"leaves a mean of {mean:g}" in note


def test_schedules_read_the_ratio_as_their_own_mean():
    solved, _ = share_mean([DivPrune(), PyramidDrop()], 0.25, 32)
    assert solved[0].keep_ratio == solved[1].keep_ratio
    # the mean of what reaches PyramidDrop is the share of what DivPrune leaves
    assert solved[0].keep_ratio == pytest.approx(0.5, abs=1e-6)


def test_the_budget_of_one_part_is_its_mean_keep_ratio():
    (solved,), _ = share_mean([FastV(layer=8)], 0.5, 32)
    assert solved.keep_ratio == pytest.approx(1 / 3)
    assert chain_mean([FastV(layer=8, mean_keep_ratio=0.5)], 32) == pytest.approx(0.5)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("chain", "mean", "words"),
    [
        ([DivPrune(keep_ratio=0.5)], 0.4, "nothing to decide"),
        ([VTW()], 0.4, "nothing to decide"),
        ([DivPrune(), FastV()], 1.5, "mean_keep_ratio must be a number in"),
        ([DivPrune(), FastV()], "half", "mean_keep_ratio must be a number in"),
        ([DivPrune(num_tokens=9), FastV()], 0.4, "divprune keeps a number of tokens"),
        ([FastV(layer=16)], 0.4, r"cannot be reached by fastv: the least is 0.500"),
        ([PyramidDrop()], 0.2, r"cannot be reached by pyramiddrop: the least is 0.25"),
        ([DivPrune(keep_ratio=0.3), FastV()], 0.4, "the parts with a budget alone leave 0.300"),
        (
            [PyramidDrop(keep_ratio=0.01), DivPrune()],
            0.4,
            "a mean of 0.01 over 32 layers cannot be reached",
        ),
    ],
    ids=str,
)
def test_a_mean_that_cannot_be_met_is_refused(chain, mean, words):
    with pytest.raises(BudgetError, match=words):
        share_mean(chain, mean, 32)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "chain",
    [
        ["divprune", "fastv"],
        ["divprune", Debias(), "sparsevlm"],
        [DivPrune(keep_ratio=0.7), "fastv"],
    ],
    ids=["open", "three", "one_fixed"],
)
def test_a_compressed_model_reports_the_mean(family, chain):
    model, inputs = model_of(family), inputs_of(family)
    chain = [SparseVLM(layers=(2, 3), ratios=(0.5, 0.25)) if p == "sparsevlm" else p for p in chain]
    compress_model(model, chain, mean_keep_ratio=0.5)
    try:
        with torch.no_grad():
            model(**inputs)
        report = compression_report(model)
    finally:
        remove_compression(model)
    # some tens of tokens an image: every placement rounds to whole ones
    sizes = [image.num_visual for sample in report.samples for image in sample.images]
    placements = max(len(i.placements) for sample in report.samples for i in sample.images)
    assert report.mean_keep_ratio == pytest.approx(0.5, abs=placements / min(sizes))
    assert any(note.startswith("chain: keep_ratio=") for note in report.notes)


def test_a_file_holds_the_mean(tmp_path):
    data = {"chain": [{"method": "divprune"}, {"method": "fastv"}], "mean_keep_ratio": 0.3}
    chain = from_mapping(data)
    assert isinstance(chain, Chain)
    assert (list(chain), chain.mean_keep_ratio) == ([DivPrune(), FastV()], 0.3)
    path = tmp_path / "chain.yaml"
    path.write_text("chain: [{method: divprune}, {method: fastv}]\nmean_keep_ratio: 0.6\n")
    assert load_config(path).mean_keep_ratio == 0.6
    model = model_of("llava")
    compress_model(model, config=path)
    remove_compression(model)
    with pytest.raises(BudgetError, match="that of the file"):
        compress_model(model, config=path, mean_keep_ratio=0.5)
    with pytest.raises(
        ConfigError, match=r"keep_ratio cannot be given.*mean_keep_ratio of a whole"
    ):
        compress_model(model, ["divprune", "fastv"], keep_ratio=0.5)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"chain": [{"method": "fastv"}], "keep_ratio": 0.5}, "no key beside it but mean_keep"),
        ({"chain": []}, "non-empty list"),
        ({"chain": [{"chain": [{"method": "fastv"}]}]}, r"chain\[0\] is a chain itself"),
    ],
    ids=str,
)
def test_malformed_chains_are_refused(data, words):
    with pytest.raises(ConfigError, match=words):
        from_mapping(data)
