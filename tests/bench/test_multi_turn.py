"""Conversations on a kept cache: what each turn says is what the whole history gives anew."""

import pytest
import torch
from tests.tiny import Image, Sample, Text, build, make_inputs

from vispress import compressed, compression_report
from vispress.bench.model.batches import make_batches
from vispress.bench.model.multi_turn import converse
from vispress.bench.tasks.task import Prompt, get_task

LATER = ("what color is the circle ? :", "how many red shapes ? :", "where is the blue ring ? :")


def conversations(kinds=("attribute", "relation"), turns=2, each=3):
    """Prompts of unequal length; some have a turn less."""
    prompts = []
    for kind in kinds:
        for number, prompt in enumerate(get_task(kind).draw(each, 0)):
            texts = [LATER[(number + turn) % 3] for turn in range(turns - number % 2)]
            followups = tuple((text, "?") for text in texts)
            prompts.append(Prompt(prompt.images, prompt.text, "?", prompt.evidence, followups))
    return prompts


def anew(subject, prompt, max_new_tokens):
    """Answers of each turn, the whole history read again for it."""
    tokenizer, model = subject.processor.tokenizer, subject.model
    inputs, answers = dict(subject.encode([prompt])), []
    for turn in range(1 + len(prompt.followups)):
        start = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[0, start:]
        ends = torch.isin(new, torch.tensor(model.generation_config.eos_token_id)).nonzero()
        new = new[: int(ends[0])] if len(ends) else new
        answers.append(tokenizer.decode(new))
        if turn < len(prompt.followups):
            text = tokenizer(prompt.followups[turn][0], add_special_tokens=False)["input_ids"]
            ids = torch.cat([inputs["input_ids"][0], new, torch.tensor(text)])[None]
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return tuple(answers)


@pytest.fixture
def ending(subject, monkeypatch):
    """A random model hardly ever ends an answer: every third word does it here."""
    tokenizer = subject.processor.tokenizer
    ends = [tokenizer.eos_token_id, *range(6, len(tokenizer), 3)]
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", ends)
    return subject


# a method that does not read the text keeps the same tokens in every turn
@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("method", [None, "divprune", "avg_pool"])
def test_turns_say_what_the_whole_history_gives_anew(ending, method):
    def run():
        got = ending.converse(prompts, ending.encode(prompts), 4)
        assert got == [anew(ending, prompt, 4) for prompt in prompts]
        assert [len(turns) for turns in got] == [3, 2, 3, 3, 2, 3]
        return got

    prompts = conversations()
    if method is None:
        lengths = {len(answer.split()) for turns in run() for answer in turns}
        assert len(lengths) > 1  # answers end at different steps
        return
    with compressed(ending.model, method, keep_ratio=0.25):
        run()


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("method", ["fastv", "visionzip", "pyramiddrop"])
def test_rows_of_a_batch_talk_as_they_do_alone(ending, method):
    subject = ending
    prompts = conversations()
    options = {"layers": (1, 2, 3)} if method == "pyramiddrop" else {}
    with compressed(subject.model, method, keep_ratio=0.5, **options):
        together = subject.converse(prompts, subject.encode(prompts), 2)
        alone = [subject.converse([p], subject.encode([p]), 2)[0] for p in prompts]
    assert together == alone


def test_the_report_is_of_the_first_turn(subject):
    prompts = conversations(each=1)
    with compressed(subject.model, "divprune", keep_ratio=0.25):
        subject.converse(prompts, subject.encode(prompts), 2)
        report = compression_report(subject.model)
    assert [image.num_kept for s in report.samples for image in s.images] == [36, 36]


def test_answers_of_turns_are_joined(subject):
    prompts = conversations(each=1, kinds=("count",))
    turns = subject.converse(prompts, subject.encode(prompts), 2)[0]
    assert subject.answer(prompts, 2) == [" / ".join(turns)]


class Numbers:
    """A tokenizer of numbers, for models without one."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row.tolist())) for row in rows]


@pytest.mark.parametrize("method", [None, "fastv"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_unequal_pictures_keep_their_own_positions(family, method):
    """M-RoPE models keep an offset a row, which must follow its row into each part."""
    model = build(family)
    samples = [
        Sample([Text(4), Image(4, 6), Text(3)]),
        Sample([Text(2), Image(6, 4), Text(5), Image(4, 4), Text(2)]),
        Sample([Text(6), Image(4, 4), Text(2)]),
    ]
    later = [["7 8 9", "11"], ["12 13", "14 15"], ["7 8 9", "16"]]

    def run():
        inputs = make_inputs(family, samples, padding="left")
        together = converse(model, Numbers(), inputs, later, 3)
        for number, turns in enumerate(together):
            one = make_inputs(family, samples, only=number)
            assert converse(model, Numbers(), one, [later[number]], 3) == [turns]

    if method is None:
        run()
        return
    with compressed(model, method, keep_ratio=0.4, layer=1):
        run()


def test_conversations_of_equal_lengths_share_a_batch(subject):
    prompts = conversations(each=4)
    batches = make_batches(subject, "talk", prompts, 4)
    assert sorted(place for batch in batches for place in batch.places) == list(range(8))
    assert all(prompts[at] is p for b in batches for at, p in zip(b.places, b.prompts, strict=True))
    turns = [{len(prompt.followups) for prompt in batch.prompts} for batch in batches]
    assert turns == [{1}, {2}]
    plain = get_task("count").draw(5, 0)
    assert [batch.places for batch in make_batches(subject, "count", plain, 2)] == [
        (0, 1),
        (2, 3),
        (4,),
    ]
