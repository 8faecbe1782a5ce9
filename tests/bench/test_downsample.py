"""Smaller pictures: at most the tokens asked, placeholders to match, and a model left as it was."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_models import (
    IMAGE_ID,
    MERGE,
    PAD,
    PATCH,
    VIDEO_ID,
    VISION_END,
    VISION_START,
    build,
)

from vispress.adapters.llava import LlavaAdapter
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.plan.downsample import Downsample, any_size, smaller
from vispress.bench.tasks.task import Prompt, get_task
from vispress.errors import BudgetError, UnsupportedMethodError


@pytest.fixture(scope="module")
def qwen():
    """A tiny Qwen2.5-VL that knows the words "a" and "b"."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = {
        "<|image_pad|>": IMAGE_ID,
        "<|video_pad|>": VIDEO_ID,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    tokenizer = Tokenizer(WordLevel({"<pad>": PAD, "a": 5, "b": 6, **marks}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", *marks])
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 64, "longest_edge": 64 * 64},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
    )
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")

    class Pictures(Qwen2_5_VLProcessor):
        """Without videos, which need torchvision."""

        def __init__(self, image_processor=None, tokenizer=None):
            self.image_token, self.image_token_id = "<|image_pad|>", IMAGE_ID
            ProcessorMixin.__init__(self, image_processor, tokenizer)

    processor = Pictures(pictures, words)
    return LoadedModel("tiny", build("qwen2_5_vl", dtype=torch.float32), processor, "none")


def questions(subject):
    """Unequal texts, and one prompt of two pictures."""
    prompts = get_task("relation").draw(2, 0) + get_task("attribute").draw(1, 0)
    images = (*prompts[0].images, *prompts[2].images)
    return [*prompts, Prompt(images, "is there <image> in <image> ? :", "yes")]


def test_grids_are_the_largest_within_the_budget():
    assert Downsample(keep_ratio=0.25).grids([(1, 12, 12), (1, 8, 4)]) == [(1, 6, 6), (1, 4, 2)]
    assert Downsample(keep_ratio=0.25).grids([(6, 8, 8)]) == [(6, 4, 4)]
    for keep_ratio in (0.056, 0.111, 0.222, 0.333, 0.5, 0.9):
        ((_, h, w),) = Downsample(keep_ratio=keep_ratio).grids([(1, 12, 12)])
        assert h * w <= round(144 * keep_ratio)
        assert (h + 1) * w > round(144 * keep_ratio)
    assert Downsample(num_tokens=1).grids([(1, 12, 12)]) == [(1, 1, 1)]


@pytest.mark.parametrize("wrong", [{"keep_ratio": 0.0}, {"num_tokens": 0}, {"keep_ratio": 2}])
def test_budgets_out_of_range_are_refused(wrong):
    with pytest.raises(BudgetError, match="must be"):
        Downsample(**wrong)


def test_llava_reads_smaller_pictures_and_the_same_words(subject):
    prompts = questions(subject)
    inputs = subject.encode(prompts)
    made = smaller(Downsample(keep_ratio=0.222), subject, inputs, prompts)
    assert made.native == [144] * 5
    assert made.kept == [30] * 5  # 5 x 6 of 32
    assert made.inputs["pixel_values"].shape == (5, 3, 40, 48)
    mark = subject.model.config.image_token_id
    for row, prompt in enumerate(prompts):
        old, new = (
            each["input_ids"][row][each["attention_mask"][row].bool()]
            for each in (inputs, made.inputs)
        )
        assert torch.equal(old[old != mark], new[new != mark])
        assert int((new == mark).sum()) == 30 * len(prompt.images)
    # the two pictures' placeholders stay apart, where they stood
    runs = (new == mark).int().diff().eq(1).sum() + (new[0] == mark)
    assert int(runs) == 2
    assert bool(made.inputs["attention_mask"][:, -1].all())


def test_llava_answers_and_is_left_as_it_was(subject):
    prompts = questions(subject)
    inputs = subject.encode(prompts)
    tower = subject.model.model.vision_tower
    with torch.no_grad():
        expected = subject.model(**inputs).logits
    before = (len(tower._forward_pre_hooks), sorted(tower.__dict__))
    made = smaller(Downsample(keep_ratio=0.111), subject, inputs, prompts)
    with pytest.raises(ValueError, match="doesn't match model"):
        subject.converse(prompts, made.inputs, 2)
    with any_size(subject.model):
        turns = subject.converse(prompts, made.inputs, 2)
        alone = smaller(Downsample(keep_ratio=0.111), subject, subject.encode(prompts[3:]), [])
        assert subject.converse(prompts[3:], alone.inputs, 2) == turns[3:]
    assert (len(tower._forward_pre_hooks), sorted(tower.__dict__)) == before
    with torch.no_grad():
        assert torch.equal(subject.model(**inputs).logits, expected)


def test_the_whole_picture_is_the_uncompressed_model(subject):
    prompts = questions(subject)
    inputs = subject.encode(prompts)
    made = smaller(Downsample(keep_ratio=1.0), subject, inputs, prompts)
    assert torch.equal(made.inputs["input_ids"], inputs["input_ids"])
    assert (made.inputs["pixel_values"] - inputs["pixel_values"]).abs().max() < 1e-5
    with any_size(subject.model), torch.no_grad():
        got = subject.model(**made.inputs).logits
        assert (got - subject.model(**inputs).logits).abs().max() < 1e-3


def test_qwen_resizes_each_picture_by_its_own_grid(qwen):
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    wide, tall = Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))
    mark = "<|vision_start|> <|image_pad|> <|vision_end|>"
    prompts = [Prompt((wide, tall), f"a {mark} b {mark} a", "b"), Prompt((tall,), f"{mark} b", "b")]
    inputs = qwen.encode(prompts)
    made = smaller(Downsample(keep_ratio=0.25), qwen, inputs, prompts)
    assert made.native == [48, 48, 48]
    assert made.kept == [12, 12, 12]
    assert made.inputs["image_grid_thw"].tolist() == [[1, 6, 8], [1, 8, 6], [1, 8, 6]]
    assert int((made.inputs["input_ids"] == IMAGE_ID).sum()) == 36
    with any_size(qwen.model):
        assert len(qwen.converse(prompts, made.inputs, 2)) == 2
    # one token a picture is less than the processor's own lower bound
    tiny = smaller(Downsample(num_tokens=1), qwen, inputs, prompts)
    assert tiny.kept == [1, 1, 1]


def test_more_tokens_than_asked_are_an_error(subject, monkeypatch):
    prompts = questions(subject)
    inputs = subject.encode(prompts)
    monkeypatch.setattr(LlavaAdapter, "resize", lambda *_: inputs)
    with pytest.raises(BudgetError, match="off target: 720 visual tokens"):
        smaller(Downsample(keep_ratio=0.5), subject, inputs, prompts)


def test_cut_pictures_are_refused_with_what_works():
    model = build("llava_next")
    with pytest.raises(UnsupportedMethodError, match="llava_next does not have"), any_size(model):
        pass
