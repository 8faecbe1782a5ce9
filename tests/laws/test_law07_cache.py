"""Law 7: the cache is really short: its bytes are those of the rows that live in each layer."""

from typing import Any

import pytest
import torch
from tests.laws.cases import DROPPING, FAMILIES, cases, inputs_of, make, model_of, settings
from tests.laws.oracle import is_linear, language_model
from tests.tiny import Image, Sample, Text, cache_by_prompts, make_inputs
from transformers import DynamicCache, StaticCache

from vispress import compressed
from vispress.errors import CompressionStateError
from vispress.methods import DivPrune, FastV
from vispress.report import CompressionReport
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of

HEADS, DIM = 2, 16
"""Key-value heads and head width of the tiny models."""
ROOM = 9


@cache_by_prompts
def single(family: str) -> dict[str, Any]:
    return make_inputs(family, [Sample([Text(4), Image(4, 4), Text(3), Image(4, 6), Text(5)])])


def rows_per_layer(model: Any, report: CompressionReport, first: int) -> list[int]:
    """Rows that each layer must hold: all before the first placement, then the longest sample's."""
    layers = language_model(model).layers
    length = report.alive(0).shape[1]
    longest = [int(report.alive(layer).sum(1).max()) for layer in range(report.num_layers)]
    held = [length if layer < first else rows for layer, rows in enumerate(longest)]
    return [0 if is_linear(layer) else rows for layer, rows in zip(layers, held, strict=True)]


def stored(cache: Any) -> list[int]:
    """Rows that each layer does hold; keys and values must own no more memory than that."""
    rows = []
    for layer in cache.layers:
        if not hasattr(layer, "keys"):  # a state, as long whatever it has seen
            rows.append(0)
            continue
        for tensor in (layer.keys, layer.values):
            batch, heads, length, dim = tensor.shape
            assert (heads, dim) == (HEADS, DIM)
            used = tensor.numel() * tensor.element_size()
            assert tensor.untyped_storage().nbytes() == used, "a view of something longer"
        rows.append(length)
        assert layer.keys.shape == layer.values.shape
        assert len(layer.keys) == batch
    return rows


def bytes_of(rows: list[int], batch: int, itemsize: int) -> int:
    return sum(rows) * batch * HEADS * DIM * 2 * itemsize


def check(family: str, method: Any, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    with compressed(model, method) as view:
        with torch.no_grad():
            out = model(**inputs)
        report = view.report
    chain = method if isinstance(method, list) else [method]
    first = min(p.layer for one in chain for p in one.placements(report.num_layers))
    expected = rows_per_layer(model, report, first)
    assert stored(cache_of(out)) == expected
    assert min(expected) < report.alive(0).shape[1]
    batch = len(inputs["input_ids"])
    assert report.kv_bytes == bytes_of(expected, batch, dtype.itemsize)
    assert cache_of(out).get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize(("family", "method"), cases("one sample", DROPPING))
def test_one_sample_stores_its_kept_rows_and_nothing_else(family: str, method: str) -> None:
    check(family, make(family, method), single(family), torch.float64)


@pytest.mark.parametrize(
    ("family", "method", "padding"), cases(7, DROPPING, turning=("left", "right"))
)
def test_a_batch_stores_its_longest_sample_and_no_padding_beyond(
    family: str, method: str, padding: str
) -> None:
    check(family, make(family, method), inputs_of(family, padding), torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_takes_half_of_fp64(family: str) -> None:
    chain = [DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.3, layer=3)]
    check(family, chain, inputs_of(family, "left", torch.float32), torch.float32)


@pytest.mark.parametrize(("family", "method"), cases("rows a step", DROPPING))
def test_each_decode_step_adds_one_row_a_layer(family: str, method: str) -> None:
    model, cache = model_of(family), DynamicCache()
    with compressed(model, method, **settings(family, method)) as report:
        model.generate(
            **single(family),
            **{CACHE: cache},
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
        alive = [int(report.alive(layer).sum()) for layer in range(report.num_layers)]
    assert stored(cache) == [rows + 3 for rows in alive]  # the last token is never fed
    assert cache.get_seq_length() == single(family)["input_ids"].shape[1] + 3


STATIC = ("fastv", "divprune", "pyramiddrop", "visionzip", "no_image", "vtw")


@pytest.mark.parametrize(("family", "method"), cases(7, [(f, m) for f in FAMILIES for m in STATIC]))
def test_static_buffers_are_allocated_short(family: str, method: str) -> None:
    model, inputs = model_of(family), single(family)
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + ROOM)
    with compressed(model, method, **settings(family, method)) as report:
        model.generate(
            **inputs, **{CACHE: cache}, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        alive = [int(report.alive(layer).sum()) for layer in range(report.num_layers)]
        assert report.kv_bytes == bytes_of([rows + ROOM for rows in alive], 1, 8)
    assert stored(cache) == [rows + ROOM for rows in alive]
    assert min(alive) < length


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache_no_byte_is_reported(family: str) -> None:
    model = model_of(family)
    with compressed(model, "fastv", keep_ratio=0.4) as report:
        with torch.no_grad():
            out = model(**single(family), use_cache=False)
        assert cache_of(out) is None
        assert report.kv_bytes == 0


def test_a_view_of_a_long_buffer_is_noticed() -> None:
    cache = DynamicCache()
    long = torch.zeros(1, HEADS, 10, DIM)
    cache.update(long, long, 0)
    assert stored(cache) == [10]
    cache.layers[0].keys = cache.layers[0].keys[:, :, :4]
    with pytest.raises(AssertionError, match="view"):
        stored(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_on_an_unpadded_cache_is_as_many_steps(family: str) -> None:
    """Attention has no mask then, and its own causality would begin at the first key."""
    model, inputs, chunk = model_of(family), single(family), torch.tensor([[9, 40, 7, 71]])
    with compressed(model, make(family, "fastv")), torch.no_grad():
        together, apart = DynamicCache(), DynamicCache()
        model(**inputs, **{CACHE: together})
        model(**inputs, **{CACHE: apart})
        at_once = model(input_ids=chunk, **{CACHE: together}).logits
        steps = [model(input_ids=one, **{CACHE: apart}).logits for one in chunk.split(1, dim=1)]
    assert (at_once - torch.cat(steps, dim=1)).abs().max() < 1e-9


def test_a_cut_that_reaches_into_an_image_is_refused() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(4, 4), Text(7)])])
    with compressed(model, make("llava", "fastv")), torch.no_grad():
        cache = DynamicCache()
        model(**inputs, **{CACHE: cache})
        with pytest.raises(CompressionStateError, match="the cut reaches into rows"):
            cache.crop(-20)  # as many rows stand there, but not those of twenty tokens
        with pytest.raises(CompressionStateError, match="start with a new cache"):
            model(input_ids=torch.tensor([[9]]), **{CACHE: cache})  # plain layers were cut by then
        whole = DynamicCache()
        model(**inputs, **{CACHE: whole})
        whole.crop(-7)
        assert whole.get_seq_length() == inputs["input_ids"].shape[1] - 7
