"""Laws 1, 2, 7, 9 and 10 for masked pairs: rows equal the model with a mask made by hand."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.cases import SAMPLES, greedy, inputs_of, logits_of, model_of, real_positions, run
from tests.laws.oracle import oracle_expand, oracle_forward, oracle_generate, oracle_loss
from tests.laws.pairs import pair_masked
from tests.laws.test_flash import flash as flash
from tests.laws.test_law01_prune_equals_mask import EXACT
from tests.laws.test_law09_generation_modes import ORDERED
from tests.laws.test_law10_training import assert_equal, gradients, labels_of, training
from tests.tiny import FAMILIES, VIDEO, Image, Sample, Text, Video, build, make_inputs
from torch import Tensor
from transformers import DynamicCache, StaticCache

from vispress import compress_model, compressed
from vispress.config import load_config
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods import CMAI, SCM, VMTC, FastV, PyramidDrop
from vispress.runtime.kv_cache.hf_compat import CACHE

CHAIN = Path(__file__).parents[2] / "configs" / "chains" / "vmtc_cmai.yaml"


def visual_of(report: Any, shape: Sequence[int]) -> Tensor:
    """`[B, L]` bool, places of all visual tokens."""
    visual = torch.zeros(*shape, dtype=torch.bool)
    for b, sample in enumerate(report.samples):
        for image in sample.images:
            visual[b, list(image.positions)] = True
    return visual


def expected_of(
    family: str, chain: list[Any], inputs: dict[str, Any], new: int
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The compressed prefill, and the oracle's prefill, tokens and step logits."""
    model = model_of(family)
    result = run(model, real_positions(family, inputs), chain, positions="original")
    layers = result.report.num_layers
    masker = next(one for one in chain if isinstance(one, CMAI))
    first = masker.placements(layers)[0].layer
    visual = visual_of(result.report, inputs["input_ids"].shape)
    seen: list[Tensor] = []
    with torch.no_grad(), pair_masked(model, result.alive, visual, first, masker.mass, seen):
        whole = oracle_forward(
            model, real_positions(family, inputs), result.alive, "original", result.values
        )
        assert any(bool(gone.any()) for gone in seen)
        tokens, steps = oracle_generate(model, inputs, result.alive, new, "original", result.values)
    return result, oracle_expand(whole, result.alive[-1]), tokens, steps


def _len(inputs: dict[str, Any]) -> int:
    return int(inputs["input_ids"].shape[1])


CHAINS: dict[str, list[Any]] = {
    "alone": [CMAI()],
    "first_layer": [CMAI(layer=1, mass=0.5)],
    "one_pair": [CMAI(mass=1e-6)],
    "after_vmtc": [VMTC(keep_ratio=0.5, scores="column_mean"), CMAI()],
    "before_fastv": [CMAI(layer=1, mass=0.6), FastV(keep_ratio=0.5, layer=4)],
    "after_fastv": [FastV(keep_ratio=0.5, layer=1), CMAI(mass=0.7)],
}


ON_TWO = ("llava", "qwen2_5_vl")
"""Families of the chains that differ in the method alone."""


@pytest.mark.some(cases=5)
@pytest.mark.parametrize(
    ("family", "chain"),
    [(f, c) for f in FAMILIES for c in CHAINS if c in ("alone", "after_vmtc") or f in ON_TWO],
)
def test_prefill_and_steps_equal_the_model_with_a_mask_made_by_hand(
    family: str, chain: str
) -> None:
    assert_equals_the_mask_made_by_hand(family, CHAINS[chain], inputs_of(family))


@pytest.mark.some(cases=4)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f in VIDEO])
def test_tokens_of_videos_are_masked_as_by_hand(family: str, padding: str) -> None:
    samples = [Sample([Text(3), Video(2, 4, 4), Text(6)]), Sample([Text(2), Image(4, 4), Text(9)])]
    inputs = make_inputs(family, samples, padding=padding)
    assert_equals_the_mask_made_by_hand(family, [CMAI()], inputs, steps=padding == "left")


def assert_equals_the_mask_made_by_hand(
    family: str, chain: list[Any], inputs: dict[str, Any], *, steps: bool = True
) -> None:
    model = model_of(family)
    result, whole, tokens, later = expected_of(family, chain, inputs, 3)
    real = inputs["attention_mask"].bool()
    assert (result.logits - whole)[real].abs().max() < EXACT
    if steps:
        with compressed(model, chain, positions="original"):
            sequences, logits = greedy(model, inputs, 3)
        assert torch.equal(sequences[:, _len(inputs) :], tokens)
        assert (logits - later).abs().max() < EXACT


def test_eager_masks_what_sdpa_masks() -> None:
    # transformers' own eager attention is NaN on padding in fp64
    inputs, found = make_inputs("llava", [Sample([Text(3), Image(4, 4), Text(9)])]), []
    for attn in ("sdpa", "eager"):
        model = model_of("llava", attn=attn)
        with compressed(model, CMAI()):
            found.append(greedy(model, inputs, 3)[1])
    assert (found[0] - found[1]).abs().max() < EXACT


@pytest.mark.some(cases=4)
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_samples_with_a_cache_are_those_without(
    family: str, mode: dict[str, Any]
) -> None:
    model, inputs, found = model_of(family), inputs_of(family), []
    if not ORDERED:
        inputs = make_inputs(family, SAMPLES[:2], padding="left")
    with compressed(model, CMAI()):
        for use_cache in (True, False):
            torch.manual_seed(5)
            found.append(model.generate(**inputs, max_new_tokens=6, use_cache=use_cache, **mode))
    assert torch.equal(found[0], found[1])


@pytest.mark.some(cases=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_equals_greedy(family: str) -> None:
    model, inputs = model_of(family), make_inputs(family, [Sample([Text(3), Image(4, 4), Text(9)])])
    with compressed(model, CMAI()):
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        lookup = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(plain, lookup)


def turns(cuts: list[int], drop: int = 0) -> tuple[Tensor, Tensor]:
    """Two images in two turns: logits of one call, and of calls cut at these places."""
    model = model_of("llava")
    parts = [Sample([Text(3), Image(4, 4), Text(6)]), Sample([Text(4), Image(4, 4), Text(7)])]
    one, two = (make_inputs("llava", [part], seed=n) for n, part in enumerate(parts))
    ids = torch.cat([one["input_ids"], two["input_ids"]], dim=1)
    pixels = [one["pixel_values"], two["pixel_values"]]
    with compressed(model, CMAI(layer=1, mass=0.6)), torch.no_grad():
        whole = model(input_ids=ids, pixel_values=torch.cat(pixels)).logits
        cache, found, places = DynamicCache(), [], [0, *cuts, ids.shape[1]]
        for start, end in pairwise(places):
            chunk = ids[:, start:end]
            more = {"pixel_values": pixels.pop(0)} if (chunk == 120).any() else {}
            mask = torch.ones(1, end, dtype=torch.long)
            if drop and not more:  # what is taken back leaves no trace
                wrong = torch.randint(3, 90, (1, drop))
                longer = torch.ones(1, start + drop, dtype=torch.long)
                model(input_ids=wrong, attention_mask=longer, **{CACHE: cache})
                cache.crop(-drop)
            found.append(
                model(input_ids=chunk, attention_mask=mask, **more, **{CACHE: cache}).logits
            )
    return whole, torch.cat(found, dim=1)


@pytest.mark.parametrize("drop", [0, 3])
def test_several_turns_and_chunks_equal_one_call(drop: int) -> None:
    one = 3 + int((inputs_of_image() == 120).sum()) + 6
    length = one + one + 2
    for cuts in ([one], [one - 2, one], [3, one - 6, one - 2, one, length - 7, length - 1]):
        whole, got = turns(cuts, drop)
        assert (whole - got).abs().max() < 1e-9


def test_tokens_taken_back_of_samples_with_fewer_words_leave_no_trace() -> None:
    model = model_of("llava")
    samples = [Sample([Text(2), Image(4, 4), Text(3)]), Sample([Text(4), Image(4, 4), Text(9)])]
    inputs = make_inputs("llava", samples, padding="left")
    token, more = torch.tensor([[7], [9]]), torch.ones(2, 1, dtype=torch.long)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    places = mask.cumsum(1) - 1

    def step(cache: Any) -> Tensor:
        seen = torch.cat([mask[:, :-2], more], dim=1)
        given = {"attention_mask": seen, "position_ids": places[:, -2:-1], CACHE: cache}
        return model(input_ids=token, **given).logits  # type: ignore[no-any-return]

    short = inputs | {"input_ids": ids[:, :-2], "attention_mask": mask[:, :-2]}
    with compressed(model, CMAI(layer=1, mass=0.6)), torch.no_grad():
        caches = [DynamicCache() for _ in range(2)]
        model(**inputs, **{CACHE: caches[0]})
        caches[0].crop(-2)
        model(**short, **{CACHE: caches[1]})
        assert (step(caches[0]) - step(caches[1])).abs().max() < 1e-9


@pytest.mark.parametrize("words", [1, 2])  # a step has a way of its own
def test_padding_of_a_cropped_cache_hides_no_pair_of_the_first_slot(words: int) -> None:
    """One sample has two images, the other one, which begins at slot 0."""
    model = model_of("llava")
    two = Sample([Text(2), Image(), Text(2), Image(), Text(4)])
    one = Sample([Image(), Text(44)], bare=True)
    inputs, alone = (make_inputs("llava", [two, one], only=only) for only in (None, 1))
    token, found = torch.full((1, words), 7), []
    with compressed(model, CMAI(layer=1, mass=1e-6)), torch.no_grad():
        for given in (inputs, alone):
            batch, cache = len(given["input_ids"]), DynamicCache()
            model(**given, **{CACHE: cache})
            cache.crop(-1)
            mask = torch.nn.functional.pad(given["attention_mask"], (0, words - 1), value=1)
            step = {"attention_mask": mask, CACHE: cache}
            found.append(model(input_ids=token.expand(batch, -1), **step).logits[-1])
    assert (found[0] - found[1]).abs().max() < 1e-9


def test_a_row_that_sees_a_later_image_keeps_sight_of_all_of_it() -> None:
    """Pairs are of words and the images before them, whatever the caller's mask shows."""
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(6), Image()], bare=True)])
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
    plain = logits_of(model, inputs)
    with compressed(model, CMAI(layer=1, mass=0.5)) as report:
        assert torch.equal(logits_of(model, inputs), plain)
        assert any("0.0% of the pairs" in note for note in report.notes)


def inputs_of_image() -> Tensor:
    ids: Tensor = make_inputs("llava", [Sample([Text(3), Image(4, 4), Text(6)])])["input_ids"]
    return ids


def test_text_before_the_first_image_is_remembered_as_seeing_none() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(6), Image(4, 4), Text(5)])])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with compressed(model, CMAI()), torch.no_grad():
        whole = model(**inputs).logits
        cache = DynamicCache()
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4], **{CACHE: cache})
        later = model(**(inputs | {"input_ids": ids[:, 4:]}), **{CACHE: cache}).logits
    assert (whole[:, 4:] - later).abs().max() < 1e-9


@pytest.mark.parametrize("what", ["select", "repeat", "reset"])
def test_rows_of_a_cache_can_be_selected_repeated_and_reset(what: str) -> None:
    model, inputs = model_of("llava"), real_positions("llava", inputs_of("llava"))
    token, every = torch.full((3, 1), 9), torch.arange(3)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    places = mask.sum(1, keepdim=True) - 1

    def step(cache: Any, rows: Tensor) -> Tensor:
        given = {"attention_mask": mask[rows], "position_ids": places[rows], CACHE: cache}
        return model(input_ids=token[rows], **given).logits  # type: ignore[no-any-return]

    with compressed(model, CMAI()), torch.no_grad():
        caches = [DynamicCache() for _ in range(2)]
        for cache in caches:
            model(**inputs, **{CACHE: cache})
        expected, rows = step(caches[0], every), every
        if what == "select":
            rows = torch.tensor([2, 0])
            caches[1].batch_select_indices(rows)
        elif what == "repeat":
            rows = every.repeat_interleave(2)
            caches[1].batch_repeat_interleave(2)
        else:
            caches[1].reset()
            model(**inputs, **{CACHE: caches[1]})
        assert (step(caches[1], rows) - expected[rows]).abs().max() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_mass_and_text_alone_are_bit_equal(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    plain = greedy(model, inputs, 3)
    text = make_inputs(family, [Sample([Text(7)])])
    words = greedy(model, text, 3)
    with compressed(model, CMAI(mass=1.0)):
        assert all(map(torch.equal, greedy(model, inputs, 3), plain))
    with compressed(model, CMAI()):
        assert all(map(torch.equal, greedy(model, text, 3), words))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model_with_a_mask_made_by_hand(family: str) -> None:
    # behind left padding the first word is predicted by padding, which sees what it likes
    model, inputs = model_of(family), inputs_of(family, "right")
    labels = labels_of(inputs)
    with training(model):
        with compressed(model, CMAI()) as report:
            loss = model(**inputs, labels=labels).loss
            got, shape = gradients(model, loss), inputs["input_ids"].shape
            alive = [report.alive(layer) for layer in range(report.num_layers)]
            first, visual = CMAI().placements(len(alive))[0].layer, visual_of(report, shape)
        with pair_masked(model, alive, visual, first):
            expected_loss = oracle_loss(model, inputs, labels, alive)
            expected = gradients(model, expected_loss)
    assert abs(loss - expected_loss) < 1e-9
    assert_equal(got, expected)


def test_a_layer_that_runs_again_masks_what_it_masked() -> None:
    from vispress.runtime.tokens.pair_masks import PairMasks

    pairs = PairMasks(CMAI(), None, (2,), 5, keeps=True)
    one = torch.ones(1, 2, 2, dtype=torch.bool)
    assert pairs.decide(3, lambda: one, torch.tensor(4)) is one
    assert pairs.decide(3, lambda: ~one, torch.tensor(4)) is one
    assert torch.stack(pairs.counts).tolist() == [[4, 4]]


def test_layers_share_what_is_the_same_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from vispress.runtime.tokens import pair_masks, pair_steps

    made: list[Any] = []
    shared = pair_masks._Shared, pair_steps._SharedStep

    def make(kind: Any, *of: Any) -> Any:
        made.append(kind(*of))
        return made[-1]

    monkeypatch.setattr(pair_masks, "_Shared", partial(make, shared[0]))
    monkeypatch.setattr(pair_steps, "_SharedStep", partial(make, shared[1]))
    model, inputs = model_of("llava"), inputs_of("llava")
    token, cache = torch.full((3, 1), 9), DynamicCache()
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    with compressed(model, CMAI(layer=1)), torch.no_grad():
        model(**inputs, **{CACHE: cache})
        cache.reorder_cache(torch.tensor([0, 0, 2]))
        model(input_ids=token, attention_mask=mask, **{CACHE: cache})
        held: list[Any] = cache.layers[1:]
    assert len({id(layer.pairs.slots) for layer in held}) == 1
    assert len({id(layer.slots) for layer in held}) == 1
    assert list(map(type, made)) == [*shared]  # one a call


def test_the_report_says_what_was_masked() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, CMAI(layer=3)) as report:
        logits_of(model, inputs)
        assert report.mean_keep_ratio == 1.0
        text = " ".join(report.notes)
    assert "drops no token; from decoder layer 3 on" in text
    assert "% of the pairs of text rows and image tokens were masked" in text
    share = float(text.rsplit("cmai: ", 1)[1].split("%")[0])
    assert 1 < share < 99


def test_the_papers_combination_is_configured_as_a_chain() -> None:
    chain = load_config(CHAIN)
    assert [part.name for part in chain] == ["vmtc", "cmai"]
    assert chain[1] == CMAI()
    assert CHAIN.read_text().startswith("#")


@pytest.mark.refusal
@pytest.mark.usefixtures("flash")
def test_flash_attention_is_refused_before_and_after() -> None:
    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", [Sample([Text(3), Image(4, 4)])], dtype=torch.float32)
    config = model.model.language_model.config
    with compressed(model, CMAI()):
        config._attn_implementation = "flash_emulated"
        with pytest.raises(UnsupportedModelError, match="dense mask, and 'flash_emulated'"):
            model(**inputs)
    with pytest.raises(UnsupportedModelError, match="dense mask, and 'flash_emulated'"):
        compress_model(model, CMAI())
    with compressed(model, CMAI(mass=1.0)):
        pass


@pytest.mark.refusal
def test_a_static_cache_is_refused() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, CMAI()), pytest.raises(UnsupportedModelError, match="static cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    with compressed(model, CMAI()), pytest.raises(UnsupportedModelError, match="static cache"):
        model(**inputs, **{CACHE: cache})


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("chain", "match"),
    [
        ([CMAI(), CMAI()], "cmai and cmai both mask pairs"),
        (
            [PyramidDrop(layers=(4,), keep_ratio=0.7), CMAI(layer=4)],
            "pyramiddrop reads the attention of decoder",
        ),
        ([SCM(keep_ratio=0.5), CMAI(layer=1)], "scm reads the attention of decoder layer 1 before"),
        ([CMAI(layer=40)], "layer must be an integer in"),
    ],
)
def test_what_cannot_be_masked_is_refused(chain: list[Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match), compressed(model_of("llava"), chain):
        pass
