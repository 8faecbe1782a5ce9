"""Law 14: what is kept depends on the prompt; no answer, draft or supervised text changes it."""

import warnings
from typing import Any

import pytest
import torch
from tests.laws.cases import CASES, cases, exact, logits_of, make, model_of, settings
from tests.laws.packing import DOCUMENTS, QWEN, ROWS, pack
from tests.laws.test_law12_documents import kept_of
from tests.tiny import Image, Sample, Text, build, cache_by_prompts, make_inputs

from vispress import compressed, prompt_lengths
from vispress.errors import ConfigError
from vispress.kinds import PROMPT_SIGNALS

PROMPTS = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(3)]),
    Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
)
SIDES = ("left", "right")


@cache_by_prompts
def with_answers(
    family: str, lengths: tuple[int, ...], padding: str, other: bool = False
) -> dict[str, Any]:
    """The prompts, each with an answer of some tokens behind it, that one or another, labelled."""
    samples = [
        Sample([*sample.parts, Text(n)]) if n else sample
        for sample, n in zip(PROMPTS, lengths, strict=True)
    ]
    inputs = positioned(family, make_inputs(family, samples, padding=padding))
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    place = mask.flip(1).cumsum(1).flip(1)  # 1 is the last token
    answer = mask & (place <= torch.tensor(lengths)[:, None])
    if other:
        inputs["input_ids"] = torch.where(answer, 3 + (ids + 41) % 110, ids)
    labels = inputs["input_ids"].masked_fill(~answer, -100)
    return inputs | {"labels": labels}


def positioned(family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Position ids that do not count padding, as `generate` has them."""
    if family in QWEN:
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.mark.parametrize(("family", "method", "padding"), cases(14, turning=SIDES))
def test_answers_change_nothing_of_what_is_kept(family: str, method: str, padding: str) -> None:
    model = model_of(family)
    prompts = without_labels(with_answers(family, (0, 0, 0), padding))
    real = prompts["attention_mask"].bool()
    lengths = real.sum(1)
    with compressed(model, method, **settings(family, method)):
        expected = logits_of(model, prompts)
        kept = kept_of(model)

        def check(inputs: dict[str, Any]) -> None:
            got = logits_of(model, inputs)
            assert kept_of(model) == kept
            for row, length in enumerate(lengths.tolist()):
                own = got[row][inputs["attention_mask"][row].bool()][:length]
                assert (own - expected[row][real[row]]).abs().max() < exact(family)

        for answers, other in (((2, 2, 2), False), ((1, 4, 3), True)):
            check(with_answers(family, answers, padding, other))
        inputs = with_answers(family, (4, 1, 2), padding)
        plain = without_labels(inputs)
        check(plain | {"prompt_lengths": lengths})
        with prompt_lengths(lengths):
            check(plain)
        shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        check(plain | {"shift_labels": shifted})


SEVERAL = Sample([Text(4), Image(4, 4), Text(5), Text(3), Text(4), Image(4, 6), Text(3), Text(2)])
"""Two turns: picture, question, answer of 3 tokens; picture, question, answer of 2."""


def turns(family: str) -> dict[str, Any]:
    """Both turns with labels on their answers."""
    inputs = make_inputs(family, [SEVERAL])
    ids = inputs["input_ids"]
    visual = ids >= 120
    text = (~visual).nonzero()[:, 1]
    labels = torch.full_like(ids, -100)
    for first, count in ((9, 3), (19, 2)):
        places = text[first : first + count]
        labels[0, places] = ids[0, places]
    return inputs | {"labels": labels}


@pytest.mark.parametrize(("family", "method"), cases("turns"))
def test_turns_behind_an_answer_change_nothing_of_an_earlier_image(
    family: str, method: str
) -> None:
    model = model_of(family)
    inputs = turns(family)
    with compressed(model, method, **settings(family, method)) as report:
        logits_of(model, inputs)
        first, second = (image.kept for image in report.samples[0].images)
        changed = dict(inputs)
        taught = (inputs["labels"] != -100).nonzero()[:, 1]
        ids = inputs["input_ids"].clone()
        ids[0, taught[3:]] = 3 + (ids[0, taught[3:]] + 41) % 110
        logits_of(model, changed | {"input_ids": ids})
        assert [image.kept for image in report.samples[0].images] == [first, second]
        ids[0, taught[:3]] = 3 + (ids[0, taught[:3]] + 41) % 110
        logits_of(model, changed | {"input_ids": ids})
        if method != "pyramiddrop":  # its mean over all turns hears what stands before the second
            assert report.samples[0].images[0].kept == first


@pytest.mark.parametrize(("family", "method"), cases("packed answers"))
def test_answers_in_packed_rows_change_nothing(family: str, method: str) -> None:
    model = model_of(family)
    answered = [Sample([*s.parts, Text(1 + n % 3)], bare=s.bare) for n, s in enumerate(DOCUMENTS)]
    packed = pack(family, model, answered, ROWS)
    labels = torch.full_like(packed.inputs["input_ids"], -100)
    order = [number for row in ROWS for number in row]
    for number, (row, _, stop) in zip(order, packed.spans, strict=True):
        count = 1 + number % 3
        labels[row, stop - count : stop] = packed.inputs["input_ids"][row, stop - count : stop]
    prompts = pack(family, model, DOCUMENTS, ROWS)
    with compressed(model, method, **settings(family, method)):
        logits_of(model, prompts.inputs)
        kept = kept_of(model, prompts)
        logits_of(model, packed.inputs | {"labels": labels})
        assert kept_of(model, packed) == kept
        lengths = [stop - start for _, start, stop in prompts.spans]
        if packed.documents.min() >= 0:  # else padding at the end is a document, too
            logits_of(model, packed.inputs | {"prompt_lengths": lengths})
            assert kept_of(model, packed) == kept


def test_lengths_that_end_behind_their_document_are_refused_by_its_number() -> None:
    model = model_of("llava")
    packed = pack("llava", model, DOCUMENTS, (tuple(range(len(DOCUMENTS))),))
    lengths = [stop - start for _, start, stop in packed.spans]
    sizes = list(lengths)
    lengths[1] += 1
    wrong = rf"prompt_lengths\[1\] is {lengths[1]}, but document 1 has {sizes[1]} tokens"
    with compressed(model, "fastv", keep_ratio=0.5), pytest.raises(ConfigError, match=wrong):
        logits_of(model, packed.inputs | {"prompt_lengths": lengths})


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options
    )
    return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("family", "method"),
    cases("no cache", [case for case in CASES if not make(*case).cached_selector()]),
)
def test_generation_without_a_cache_keeps_what_the_prompt_chose(family: str, method: str) -> None:
    model, inputs = model_of(family), make_inputs(family, PROMPTS, padding="left")
    with compressed(model, method, **settings(family, method)) as report:
        expected = generated(model, inputs)
        kept = [image.kept for sample in report.samples for image in sample.images]
        assert torch.equal(generated(model, inputs, use_cache=False), expected)
        assert [image.kept for sample in report.samples for image in sample.images] == kept


@cache_by_prompts
def assistant(family: str) -> Any:
    """Another model of the family: its drafts are wrong."""
    return build(family, seed=5)


@pytest.mark.parametrize(
    ("family", "method", "draft"), cases("drafts", turning=("lookup", "assistant"))
)
def test_drafts_change_nothing_of_the_greedy_output(family: str, method: str, draft: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(3), Image(4, 4), Text(2), Image(4, 6), Text(9)])])
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, -9:-6]  # found again by the look-up
    options = {"prompt_lookup_num_tokens": 3}
    if draft == "assistant":
        options = {"assistant_model": assistant(family)}
    with compressed(model, method, **settings(family, method)) as report:
        expected = generated(model, inputs)
        kept = [image.kept for image in report.samples[0].images]
        assert torch.equal(generated(model, inputs, **options), expected)
        assert [image.kept for image in report.samples[0].images] == kept


@pytest.mark.parametrize(("family", "method"), cases("nobody asks"))
def test_an_image_that_nothing_asks_about_passes_whole(family: str, method: str) -> None:
    """No supervised token stands behind it; methods that do not look at text go on as ever."""
    model, inputs = (
        model_of(family),
        positioned(family, make_inputs(family, PROMPTS, padding="left")),
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]  # of one sample alone
    compressor = make(family, method)
    with compressed(model, compressor) as report:
        logits_of(model, inputs)
        kept = [[image.kept for image in sample.images] for sample in report.samples]
        logits_of(model, inputs | {"labels": labels})
        asked, _, *others = [[i.kept for i in sample.images] for sample in report.samples]
        whole = [tuple(range(i.num_visual)) for i in report.samples[2].images]
        notes = [note for note in report.notes if "2 of 3 images pass whole" in note]
    reads = bool(compressor.signals() & PROMPT_SIGNALS)
    asks = [reads or each.queries is not None for each in compressor.placements(6)]
    if all(asks):
        assert others == [whole]
    elif not any(asks):
        assert others == [kept[2]]
    assert all(set(few) <= set(more) for few, more in zip(kept[2], others[0], strict=True))
    assert bool(notes) == any(asks)
    assert len(asked) == 1


def test_labels_on_visual_tokens_are_warned_of() -> None:
    model, inputs = model_of("llava"), make_inputs("llava", PROMPTS, padding="right")
    every = inputs["input_ids"].masked_fill(~inputs["attention_mask"].bool(), -100)
    visual = inputs["input_ids"] == model.config.image_token_id
    answer = torch.full_like(every, -100)
    answer[:, -1] = every[:, -1]
    with compressed(model, make("llava", "fastv")) as report, torch.no_grad():
        with pytest.warns(UserWarning, match=r"labels are on visual tokens.*assistant_only_loss"):
            model(**inputs, labels=every)
        assert all(i.num_kept == i.num_visual for s in report.samples for i in s.images)
        one = torch.full_like(every, -100)
        one.view(-1)[visual.view(-1).nonzero()[-1]] = 3
        with pytest.warns(UserWarning, match="labels are on visual tokens"):
            model(**inputs, labels=one)
        for labels in (answer, every.masked_fill(visual, -100), None):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(**inputs, labels=labels)
