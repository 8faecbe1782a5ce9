"""Law 12 under a varlen kernel: bounds are cut to the rows that live, document by document."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.laws.cases import (
    CASES,
    MASKING,
    QWEN,
    cases,
    exact,
    logits_of,
    model_of,
    real_positions,
    settings,
)
from tests.laws.emulated_flash import CALLS, NAME, VARLEN, Call, emulating, running_flash
from tests.laws.packing import DOCUMENTS, ROWS, Packed, pack
from tests.laws.test_law12_documents import kept_of

from vispress import compressed, compression_report
from vispress.errors import ConfigError
from vispress.runtime.forward import layer_inputs

FORMS = ("bounds", "bounds_and_cache", "positions")
"""How the kernel learns of documents; by positions where the batch is one row alone."""
UNMASKED = [case for case in CASES if case[1] not in MASKING]


@pytest.fixture(autouse=True)
def _flash() -> Iterator[None]:
    with emulating():
        yield


def packed_for(form: str, family: str, samples: Any = DOCUMENTS, rows: Any = ROWS) -> Packed:
    """Packed documents with the bounds of the whole batch, or in one row with positions."""
    model = model_of(family)
    if form == "positions":
        return pack(family, model, samples, [[n for row in rows for n in row]])
    packed = pack(family, model, samples, rows)
    starts = torch.nn.functional.pad(packed.documents, (1, 0), value=-2).diff() != 0
    ends = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
    bounds = torch.tensor(ends, dtype=torch.int32)
    longest = int(bounds.diff().max())
    packed.inputs.update(zip(VARLEN, (bounds, bounds, longest, longest), strict=True))
    if form == "bounds_and_cache":
        del packed.inputs["use_cache"]
    return packed


def decoder_calls(model: Any) -> list[Call]:
    """Calls of the kernel by decoder layers."""
    layers = {id(layer.self_attn) for layer in model.model.language_model.layers}
    return [call for call in CALLS if id(call.module) in layers]


def assert_each_as_alone(family: str, packed: Packed, method: Any, **options: Any) -> None:
    """And no layer's bounds say anything else than what lives in it."""
    model, documents = model_of(family), packed.documents
    with running_flash(model), compressed(model, method, **options):
        together = logits_of(model, packed.inputs)
        kept, report = kept_of(model, packed), compression_report(model)
    calls = {call.module.layer_idx: call for call in decoder_calls(model)}  # the last is no peek
    assert sorted(calls) == list(range(report.num_layers))
    for layer, call in calls.items():
        assert call.mask is None
        assert call.ends is not None
        lengths = torch.tensor(call.ends).diff().tolist()
        alive = report.alive(layer)
        for row, live in enumerate(alive):
            lengths.append(-(call.rows - int(live.sum())))  # padding in front of a short row
            for number in documents[row].unique().tolist():
                lengths.append(-int((live & (documents[row] == number)).sum()))
        assert sorted(n for n in lengths if n > 0) == sorted(-n for n in lengths if n < 0)
    for number, (row, start, stop) in enumerate(packed.spans):
        with compressed(model, method, **options):
            expected = logits_of(model, real_positions(family, packed.alone[number]))[0]
            assert kept[number] == kept_of(model)[0]
        assert (together[row, start:stop] - expected).abs().max() < exact(family)


@pytest.mark.parametrize(("family", "method", "form"), cases("varlen", UNMASKED, turning=FORMS))
def test_bounds_are_those_of_what_lives(family: str, method: str, form: str) -> None:
    assert_each_as_alone(family, packed_for(form, family), method, **settings(family, method))


@pytest.mark.parametrize("family", QWEN)
def test_bounds_of_the_encoder_are_its_own(family: str) -> None:
    """A varlen encoder takes all images in one row, with bounds of its own."""
    model, packed = model_of(family), packed_for("positions", family)
    config = model.model.visual.config
    before = config._attn_implementation
    expected = [kept_alone(family, packed, number) for number in range(len(packed.spans))]
    config._attn_implementation = NAME
    try:
        with running_flash(model), compressed(model, "fastervlm", **settings(family, "fastervlm")):
            logits_of(model, packed.inputs)
            kept = kept_of(model, packed)
    finally:
        config._attn_implementation = before
    assert any(call.ends is not None and "ision" in type(call.module).__name__ for call in CALLS)
    assert kept == expected


def kept_alone(family: str, packed: Packed, number: int) -> Any:
    model = model_of(family)
    with compressed(model, "fastervlm", **settings(family, "fastervlm")):
        logits_of(model, real_positions(family, packed.alone[number]))
        return kept_of(model)[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_mask_with_padding_overrules_bounds_as_in_transformers(family: str) -> None:
    """One of ones does not: it never reaches the kernel."""
    model, packed = model_of(family), packed_for("bounds", family)
    ones = torch.ones_like(packed.inputs["input_ids"])
    some = ones.clone()
    some[1, -2:] = 0
    plain = {name: value for name, value in packed.inputs.items() if name not in VARLEN}
    with running_flash(model), compressed(model, "fastv", keep_ratio=0.4):
        both = logits_of(model, packed.inputs | {"attention_mask": some})
        assert torch.equal(both, logits_of(model, plain | {"attention_mask": some}))
        both = logits_of(model, packed.inputs | {"attention_mask": ones})
        assert torch.equal(both, logits_of(model, packed.inputs))


def test_bounds_that_do_not_fit_the_rows_are_refused() -> None:
    model, packed = model_of("llava"), packed_for("bounds", "llava")
    length = packed.inputs["input_ids"].shape[1]
    for ends in ([0, 2 * length], [0, length, 2 * length + 3]):
        bounds = torch.tensor(ends, dtype=torch.int32)
        given = packed.inputs | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        with (
            running_flash(model),
            compressed(model, "fastv", keep_ratio=0.4),
            pytest.raises(ConfigError, match=f"does not fit 2 rows of {length} tokens"),
        ):
            model(**given)


def test_a_bound_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated kernel refuses bounds of rows that are gone, as a real one would read them."""
    monkeypatch.setattr(layer_inputs, "varlen_kwargs", lambda *_: {})
    with pytest.raises(AssertionError, match="bounds end at"):
        assert_each_as_alone(
            "llava", packed_for("bounds", "llava"), "divprune", **settings("llava", "divprune")
        )
