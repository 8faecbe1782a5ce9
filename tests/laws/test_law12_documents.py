"""Law 12: a document of a packed row is what it is alone, and what the masked model makes of it."""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    DROPPING,
    FAMILIES,
    cases,
    encoding_as,
    exact,
    fits,
    logits_of,
    make,
    model_of,
    on_videos,
    real_positions,
    run,
    settings,
)
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.laws.packing import (
    QWEN,
    VIDEO_ROWS,
    WITH_VIDEOS,
    Packed,
    block_diagonal,
    pack,
)
from tests.tiny import Image, Sample, Text

from vispress import compressed, compression_report, prompt_lengths
from vispress.errors import CompressionStateError
from vispress.methods import DivPrune, FastV, PyramidDrop, Random, TransPrune
from vispress.methods.base import Compressor

ORACLE = 1e-5  # logits of scale 20, fp64 weights; norms and rotary tables are fp32 in transformers
FORMS = ("positions", "mask", "additive", "cached")
"""How a caller says which tokens belong together (kernels with bounds: `test_varlen`)."""


def packed_as(form: str, family: str, **more: Any) -> Packed:
    """Packed documents, told apart in one of the forms."""
    model = model_of(family)
    if form == "positions":
        return pack(family, model, **more)
    packed = pack(family, model, gap=2, **more)
    dtype = torch.float64 if form == "additive" else torch.bool
    packed.inputs["attention_mask"] = block_diagonal(packed, dtype)
    if form == "cached":
        del packed.inputs["use_cache"]
    return packed


def kept_of(model: Any, packed: Packed | None = None) -> list[list[tuple[tuple[int, ...], ...]]]:
    """Kept sets of every image after every placement, document by document."""
    try:
        report = compression_report(model)
    except CompressionStateError:
        return [[]]
    spans = [(row, 0, report.alive(0).shape[1]) for row in range(len(report.samples))]
    return [
        [
            tuple(placement.kept for placement in image.placements)
            for image in report.samples[row].images
            if start <= image.positions[0] < stop
        ]
        for row, start, stop in (spans if packed is None else packed.spans)
    ]


def assert_each_as_alone(family: str, packed: Packed, method: Any, **options: Any) -> None:
    model = model_of(family)
    with compressed(model, method, **options):
        together = logits_of(model, packed.inputs)
        kept = kept_of(model, packed)
    for number, (row, start, stop) in enumerate(packed.spans):
        with compressed(model, method, **options):
            expected = logits_of(model, real_positions(family, packed.alone[number]))[0]
            assert kept[number] == kept_of(model)[0]
        assert (together[row, start:stop] - expected).abs().max() < exact(family)


@pytest.mark.parametrize(("family", "method", "form"), cases(12, turning=FORMS))
def test_each_document_is_what_it_is_alone(family: str, method: str, form: str) -> None:
    assert_each_as_alone(family, packed_as(form, family), method, **settings(family, method))


def test_a_document_of_one_or_two_tokens_is_not_of_the_one_behind_it() -> None:
    model, family = model_of("llava"), "llava"
    samples = (
        Sample([Text(1)]),
        Sample([Text(5), Image(4, 4), Text(7)]),
        Sample([Text(2)]),
        Sample([Text(3), Image(4, 4), Text(8)]),
    )
    packed = pack(family, model, samples, ((0, 1), (2, 3)))
    assert_each_as_alone(family, packed, "fastv", keep_ratio=0.4)
    lengths = [stop - start for _, start, stop in packed.spans]
    with compressed(model, "fastv", keep_ratio=0.4), prompt_lengths(lengths):
        logits_of(model, packed.inputs)  # one length is asked for of each document


@pytest.mark.parametrize(
    ("family", "method", "form"), cases("packed videos", on_videos(), turning=FORMS)
)
def test_a_document_with_a_video_is_what_it_is_alone(family: str, method: str, form: str) -> None:
    packed = packed_as(form, family, samples=WITH_VIDEOS, rows=VIDEO_ROWS)
    assert_each_as_alone(family, packed, method, **settings(family, method))


CHAINS: dict[str, list[Compressor]] = {
    "pre_then_in": [DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2)],
    "three": [Random(keep_ratio=0.7), TransPrune(keep_ratio=0.5), FastV(keep_ratio=0.5, layer=5)],
    "schedule_last": [DivPrune(keep_ratio=0.5), PyramidDrop()],
}


@pytest.mark.some(cases=8)
@pytest.mark.parametrize(
    ("family", "chain", "form"),
    [
        pytest.param(family, chain, form, marks=() if (i + j + k) % 4 == 0 else pytest.mark.full)
        for i, family in enumerate(FAMILIES)
        for j, chain in enumerate(CHAINS)
        for k, form in enumerate(FORMS)
    ],
)
def test_a_chain_treats_each_document_as_if_alone(family: str, chain: str, form: str) -> None:
    assert_each_as_alone(family, packed_as(form, family), CHAINS[chain])


COUNTING = [
    (family, method)
    for family in FAMILIES
    for method in ("fastv", "divprune", "visionzip", "no_image", "framefusion")
    if family not in QWEN and fits(family, method)
]


@pytest.mark.some(cases=14)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("family", "method", "form"), cases(12, COUNTING, turning=FORMS))
def test_position_policies_count_within_a_document(
    family: str, method: str, form: str, positions: Any
) -> None:
    videos = {"samples": WITH_VIDEOS, "rows": VIDEO_ROWS} if method == "framefusion" else {}
    packed = packed_as(form, family, **videos)
    options = settings(family, method) | {"positions": positions}
    assert_each_as_alone(family, packed, method, **options)


@pytest.mark.parametrize(("family", "method"), cases("packed oracle", DROPPING))
def test_packed_rows_equal_the_masked_model(family: str, method: str) -> None:
    model, packed = model_of(family), packed_as("positions", family)
    result = run(model, packed.inputs, make(family, method), documents=packed.documents)
    documents = packed.documents
    with encoding_as(model, result.encoded):
        masked = oracle_forward(
            model, packed.inputs, result.alive, result.positions, result.values, documents
        )
    expected = oracle_expand(masked, result.alive[-1], documents)
    assert (result.logits - expected)[documents >= 0].abs().max() < ORACLE


def test_pairs_of_two_documents_are_no_pairs() -> None:
    """The report's share of masked pairs counts those that the model's mask allows."""
    model, packed = model_of("llava"), packed_as("positions", "llava", rows=((0, 3),))
    mask = torch.zeros(block_diagonal(packed).shape, dtype=torch.float64)
    mask = mask.masked_fill(~block_diagonal(packed), -1e9)
    shares = []
    for inputs in (
        packed.inputs,
        packed.inputs | {"attention_mask": mask},
        *(one | {"use_cache": False} for one in packed.alone),
    ):
        with compressed(model, "cmai") as report:
            logits_of(model, inputs)
            shares.append(next(note for note in report.notes if "%" in note))
    together, additive, *apart = (float(note.split(": ")[1].split("%")[0]) for note in shares)
    assert min(apart) <= together <= max(apart)
    assert additive == together
