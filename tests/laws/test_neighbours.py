"""Visual tokens attend to visual tokens around them (`LayerCompute.window`), others to all."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, logits_of, model_of, run
from tests.laws.emulated_flash import NAME, emulating
from tests.laws.headless import without_heads
from tests.laws.neighbours import places_of, seeing, sight_of
from tests.laws.oracle import oracle_forward, oracle_generate, oracle_loss
from tests.laws.packing import block_diagonal, pack
from tests.laws.pairs import pair_masked
from tests.laws.softly import Softly, soft_logits
from tests.laws.test_law10_training import (
    assert_equal,
    checkpointing,
    gradients,
    labels_of,
    loss_of,
    training,
)
from tests.laws.windows import batch, expected_logits, windowed
from tests.tiny import VIDEO, Image, Sample, Text, Video, build, make_inputs
from torch import Tensor

from vispress import compress_model, compressed
from vispress.adapters.base import find_adapter
from vispress.errors import ConfigError, UnsupportedMethodError, UnsupportedModelError
from vispress.methods import CMAI, SCM, VTW, YOPO, AttendedCache, DivPrune, FastV
from vispress.runtime.kv_cache.hf_compat import CACHE

DEPTH = 6
EXACT = 1e-5
NAMES = ("llava", "llava_next", "qwen2_5_vl")
ALL = range(DEPTH)


def windows(causal: bool = False, **more: Any) -> YOPO:
    return YOPO(**({"ffn_ratio": 1, "layer": DEPTH, "window": 3, "causal": causal} | more))


def sight_in(model: Any, inputs: dict[str, Any], found: Any, causal: bool = False) -> Any:
    """Of a run of `windows`."""
    return sight_of(found.report, places_of(model, inputs), found.alive[0], 3, causal)


def visual_of(report: Any, shape: Any) -> Tensor:
    marks = torch.zeros(shape, dtype=torch.bool)
    for b, sample in enumerate(report.samples):
        for image in sample.images:
            marks[b, list(image.positions)] = True
    return marks


def assert_equals_oracle(
    model: Any, inputs: dict[str, Any], causal: bool = False, most: float = EXACT
) -> None:
    found, real = run(model, inputs, windows(causal)), inputs["attention_mask"].bool()
    sight = sight_in(model, inputs, found, causal)
    with torch.no_grad():
        other = oracle_forward(model, inputs, found.alive)
        with seeing(model, sight, ALL):
            expected = oracle_forward(model, inputs, found.alive)
    assert (found.logits - expected)[real].abs().max() < most
    assert (found.logits - other)[real].abs().max() > 0.1


@pytest.mark.some(cases=14)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_equals_the_masked_model(family: str, padding: str, causal: bool) -> None:
    """Two images in a sample: neither sees the other; crops and newlines of AnyRes as well."""
    assert_equals_oracle(model_of(family), inputs_of(family, padding), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_eager_attention_is_the_same(family: str, causal: bool) -> None:
    # eager attention of transformers is no number under padding in fp64
    model = model_of(family, torch.float32, "eager")
    assert_equals_oracle(model, inputs_of(family, "left", torch.float32), causal, 1e-3)


@pytest.mark.parametrize("family", VIDEO)
def test_a_frame_is_a_picture_of_its_own(family: str) -> None:
    samples = [Sample([Text(3), Video(3, 4, 4), Text(6)]), Sample([Text(2), Image(), Text(3)])]
    assert_equals_oracle(model_of(family), make_inputs(family, samples, padding="left"))


def test_without_padding_the_mask_is_made_here() -> None:
    """SDPA is handed none then."""
    for name in ("llava", "qwen2_5_vl"):
        inputs = make_inputs(name, [Sample([Text(3), Image(4, 6), Text(6)])])
        assert_equals_oracle(model_of(name), inputs)


@pytest.mark.parametrize("form", ["positions", "bool", "additive"])
@pytest.mark.parametrize("family", NAMES)
def test_documents_of_a_row_do_not_see_each_other(family: str, form: str) -> None:
    model = model_of(family)
    packed = pack(family, model, gap=0 if form == "positions" else 2)
    if form != "positions":
        dtype = torch.bool if form == "bool" else torch.float64
        packed.inputs["attention_mask"] = block_diagonal(packed, dtype)
    with compressed(model, windows()):
        together = logits_of(model, packed.inputs)
        for (row, start, stop), alone in zip(packed.spans, packed.alone, strict=True):
            expected = logits_of(model, alone)[0]
            assert (together[row, start:stop] - expected).abs().max() < EXACT


def test_what_a_mask_hides_is_not_shown() -> None:
    """Tokens of an image that are masked: those before them must not see them either."""
    model, inputs = model_of("llava"), dict(inputs_of("llava"))
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, places[7:20]] = 0
    assert_equals_oracle(model, inputs)


@pytest.mark.parametrize("family", NAMES)
def test_with_the_other_parts(family: str) -> None:
    """Slices of FFNs, inactive heads, and no visual token from the middle on."""
    model, inputs = model_of(family), inputs_of(family)
    heads = ((), (0,), (2, 3), (), (), ())
    method = windows(ffn_ratio=2, layer=4, inactive_heads=heads)
    found, real = run(model, inputs, method), inputs["attention_mask"].bool()
    visual = visual_of(found.report, real.shape)
    off, sight = {1: (0,), 2: (2, 3)}, sight_in(model, inputs, found)
    with torch.no_grad(), seeing(model, sight, range(4)), without_heads(model, visual, real, off):
        expected = oracle_forward(model, inputs, found.alive, values=found.values)
    rows = real & found.alive[-1]
    assert (found.logits - expected)[rows].abs().max() < EXACT


@pytest.mark.parametrize("family", NAMES)
def test_what_is_left_of_an_image_stands_where_it_stood(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    found = run(model, inputs, [DivPrune(keep_ratio=0.4), windows()], positions="original")
    with torch.no_grad(), seeing(model, sight_in(model, inputs, found), ALL):
        expected = oracle_forward(model, inputs, found.alive, values=found.values)
    rows = inputs["attention_mask"].bool() & found.alive[-1]
    assert (found.logits - expected)[rows].abs().max() < EXACT


@pytest.mark.some(cases=5)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", NAMES)
def test_what_is_decoded_sees_all(family: str, cache: str | None) -> None:
    model, inputs = model_of(family), inputs_of(family)
    found, prompt = run(model, inputs, windows()), inputs["input_ids"].shape[1]
    static = {"cache_implementation": "static", "disable_compile": True}
    with compressed(model, windows()):
        made = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
            use_cache=cache is not None, return_dict_in_generate=True,
            **(static if cache == "static" else {}),
        )  # fmt: skip
    with seeing(model, sight_in(model, inputs, found), ALL):
        tokens, steps = oracle_generate(model, inputs, found.alive, 3)
    assert torch.equal(made.sequences[:, prompt:], tokens)
    assert (torch.stack(made.logits, 1) - steps).abs().max() < EXACT


@pytest.mark.parametrize("family", NAMES)
def test_gradients_are_those_of_the_masked_model(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    found, labels = run(model, inputs, windows()), labels_of(inputs)
    sight = sight_in(model, inputs, found)
    for reentrant in (None, False):
        again = nullcontext() if reentrant is None else checkpointing(model, reentrant=reentrant)
        with training(model):
            with compressed(model, windows()), again:
                loss = loss_of(model, inputs)
                got = gradients(model, loss)
            with seeing(model, sight, ALL):
                wanted = oracle_loss(model, inputs, labels, found.alive)
                expected = gradients(model, wanted)
        assert abs(loss - wanted) < EXACT
        assert_equal(got, expected, 1e-5)


def test_a_window_is_not_counted_as_a_saving() -> None:
    model, inputs, ratios = model_of("llava"), inputs_of("llava"), []
    for method in (YOPO(), YOPO(window=3)):
        with compressed(model, method) as report:
            logits_of(model, inputs)
            ratios.append(report.flops["mac3"].ratio)
            notes = report.notes
    assert ratios[0] == ratios[1]
    assert any("those in the 3 x 3 around them in decoder layers 0 to 2" in note for note in notes)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_sliding_window_of_the_models_hides_on_both_sides(name: str) -> None:
    """A token six positions ahead is a neighbour of one that does not see six back."""
    model, inputs, size = windowed(name, 6), batch(name), 6
    found, real = run(model, inputs, windows()), inputs["attention_mask"].bool()
    sight = sight_in(model, inputs, found)
    places, slides = torch.arange(real.shape[1]), range(3 if name == "qwen2" else 0, DEPTH)
    inside = sight.shown & ((places[:, None] - places).abs() < size)
    assert not torch.equal(inside, sight.shown)
    whole, part = [i for i in ALL if i not in slides], sight._replace(shown=inside)
    with torch.no_grad(), seeing(model, sight, whole), seeing(model, part, slides):
        expected = expected_logits(model, found, inputs)
    assert (found.logits - expected)[real].abs().max() < EXACT


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_soft_keys_are_soft_ahead_too(family: str) -> None:
    """A token behind counts what it counts itself, not what the row does."""
    model, inputs, softly = model_of(family), inputs_of(family), Softly(layers=(0,))
    found, real = run(model, inputs, windows()), inputs["attention_mask"].bool()
    with training(model):
        with compressed(model, [softly, windows()], positions="original"):
            got = model(**inputs).logits
        with seeing(model, sight_in(model, inputs, found), ALL):
            expected = soft_logits(model, inputs, softly)
    assert (got - expected)[real].abs().max() < EXACT


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_layer_has_the_pairs_that_it_masks_itself(family: str) -> None:
    """CMAI hands each layer a mask of its own."""
    model, inputs = model_of(family), inputs_of(family)
    found = run(model, inputs, [windows(), CMAI(layer=1)])
    real, visual = inputs["attention_mask"].bool(), visual_of(found.report, found.alive[0].shape)
    sight = sight_in(model, inputs, found)
    with torch.no_grad(), seeing(model, sight, ALL), pair_masked(model, found.alive, visual, 1):
        expected = oracle_forward(model, inputs, found.alive)
    assert (found.logits - expected)[real].abs().max() < EXACT


def test_rows_that_leave_between_windows_leave_their_masks() -> None:
    """SDPA is handed no mask here, neither before nor behind."""
    model, inputs = model_of("llava"), make_inputs("llava", [Sample([Text(3), Image(), Text(6)])])
    found = run(model, inputs, [windows(), VTW(layer=3)])
    with torch.no_grad(), seeing(model, sight_in(model, inputs, found), ALL):
        expected = oracle_forward(model, inputs, found.alive)
    assert (found.logits - expected)[found.alive[-1]].abs().max() < EXACT


def test_causal_windows_see_nothing_later_whatever_the_mask_shows() -> None:
    """In a caller's mask the tokens of an image see each other, as in Gemma 3."""
    model, inputs = model_of("llava"), make_inputs("llava", [Sample([Text(3), Image(), Text(6)])])
    places = inputs["input_ids"][0] == model.config.image_token_id
    causal = torch.ones(len(places), len(places), dtype=torch.bool).tril()
    both, out = causal | (places[:, None] & places), []
    for mask in (causal, both):
        with compressed(model, windows(causal=True)):
            out.append(logits_of(model, inputs | {"attention_mask": mask[None, None]}))
    assert torch.equal(*out)
    assert (
        logits_of(model, inputs | {"attention_mask": both[None, None]}) - out[0]
    ).abs().max() > 1


# --- turns, and what is refused


def turn(inputs: dict[str, Any], cache: Any, more: Tensor) -> dict[str, Any]:
    ones = torch.ones_like(more)
    mask = torch.cat([inputs["attention_mask"], ones], 1)
    return {"input_ids": more, "attention_mask": mask, CACHE: cache}


@pytest.mark.slow
def test_a_turn_of_text_sees_all_and_one_with_images_is_refused() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    more = torch.full((3, 4), 9)
    with compressed(model, windows()), torch.no_grad():
        whole = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], more], 1)}
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected = model(**whole).logits[:, -4:]
        places = whole["position_ids"]
        cache = model(**inputs, position_ids=places[:, :-4]).past_key_values
        got = model(**turn(inputs, cache, more), position_ids=places[:, -4:]).logits
        assert (got - expected).abs().max() < EXACT
        cache = model(**inputs).past_key_values
        again = dict(inputs) | turn(inputs, cache, inputs["input_ids"])
        with pytest.raises(ConfigError, match=r"windows leave these out.*window=None"):
            model(**again)


def test_what_cannot_work_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llava", dtype=torch.float64), inputs_of("llava")
    with pytest.raises(ConfigError, match=r"fastv reads the attention of decoder layer 1.*yopo"):
        compress_model(model, [windows(), FastV(keep_ratio=0.5, layer=2)])
    with pytest.raises(ConfigError, match=r"attended_cache evicts by the attention.*yopo"):
        compress_model(model, [windows(), AttendedCache(keep_ratio=0.5)])
    with pytest.raises(ConfigError, match=r"scm reads .*yopo lets visual tokens see a window"):
        compress_model(model, [SCM(keep_ratio=0.5), windows()])
    adapter = type(find_adapter(model))
    monkeypatch.setattr(adapter, "layouts", lambda _, m, counts, call: [(None, None)] * len(counts))
    with (
        compressed(model, windows()),
        pytest.raises(UnsupportedMethodError, match=r"36 tokens has no known grid.*window=None"),
    ):
        logits_of(model, inputs)


def test_flash_attention_is_refused_at_once_and_in_a_call() -> None:
    model, inputs = build("llava"), inputs_of("llava", dtype=torch.float32)
    with emulating():
        with compressed(model, windows()):
            model.model.language_model.config._attn_implementation = NAME
            with pytest.raises(UnsupportedModelError, match="needs a dense mask"):
                logits_of(model, inputs)
        with pytest.raises(UnsupportedModelError, match=r"dense mask.*window=None"):
            compress_model(model, windows())
        with compressed(model, windows(window=None)):
            logits_of(model, inputs)
