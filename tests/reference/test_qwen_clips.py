"""Clips in the Qwen reference: encoder, processor, packing, training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vispress.reference import load, train_reference
from vispress.reference.evaluation.clip_sets import clip_accuracy, clip_answers, held_out_clips
from vispress.reference.model.architecture import ARCHITECTURES
from vispress.reference.model.checkpoint import export, for_inference, for_training
from vispress.reference.model.llava import build_model, reference_config
from vispress.reference.model.processor import build_processor, build_qwen_processor, with_marks
from vispress.reference.model.qwen import TOKENS_PER_SECOND, encode_clips, encode_qwen
from vispress.reference.train.clip_batches import ROUND, SINGLES, ClipStream
from vispress.reference.train.language import answer_loss
from vispress.reference.train.optim import make_optimizer
from vispress.reference.world.clips import STEPS, show_clip
from vispress.reference.world.words import CLIP_KINDS

QWEN = ARCHITECTURES["qwen2_5_vl"]


def tiny(vision_layers=3, text_layers=3):
    config = {"vision_layers": vision_layers, "text_layers": text_layers}
    return QWEN.build(config, 0).eval()


def noise(videos, frames=12, side=8, seed=0):
    shape = (videos, frames, 12 * side, 12 * side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(videos, texts=None, processor=None):
    processor = processor or build_qwen_processor()
    texts = texts or ["<video> which shape changed its color ? :"] * len(videos)
    texts = [with_marks(processor, text) for text in texts]
    return processor(text=texts, videos=list(videos), padding=True, return_tensors="pt")


# --- encoder


@pytest.mark.parametrize("side", [7, 8])
def test_batched_steps_compute_what_the_model_computes(side):
    """Two unlike frames a step; also where the edge cuts windows."""
    model, frames = tiny(), noise(2, 4, side)
    inputs = encode(frames)
    assert inputs["video_grid_thw"].tolist() == [[2, 2 * side, 2 * side]] * 2
    with torch.no_grad():
        theirs = model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
        ours = encode_clips(model, torch.from_numpy(frames))
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=0)


def test_a_still_step_is_a_picture():
    model, frames = tiny(), torch.from_numpy(noise(1, 1)).repeat(1, 2, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_clips(model, frames), encode_qwen(model, frames[:, 0]), atol=1e-5, rtol=0
        )


# --- processor


def test_patches_are_in_the_order_of_qwen():
    """Steps, then tokens, then the four patches of a token; in each: channels, frames, pixels."""
    frames = noise(1)
    axes = frames[0].reshape(6, 2, 8, 2, 6, 8, 2, 6, 3) / 127.5 - 1
    patches = axes.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(6 * 256, 216)
    pixels = encode(frames)["pixel_values_videos"]
    torch.testing.assert_close(pixels, torch.from_numpy(patches).float(), atol=1e-5, rtol=0)


def test_videos_become_marks_types_and_seconds():
    frames = show_clip(0, "test", 0).frames
    texts = ["<video> how many stars ? :", "is there a ring in <video> or <video> ? :"]
    inputs = encode([frames, frames[:4], frames[:3]], texts)
    counts = [[384], [128, 128]]
    for row, own in enumerate(counts):
        types = inputs["mm_token_type_ids"][row]
        runs = (types == 2).int().diff(prepend=torch.zeros(1)).eq(1).sum()
        assert int((types == 2).sum()) == sum(own)
        assert int(runs) == len(own)
    # an odd frame is shown twice
    assert inputs["video_grid_thw"].tolist() == [[6, 16, 16], [2, 16, 16], [2, 16, 16]]
    assert inputs["second_per_grid_ts"].tolist() == [1.0, 1.0, 1.0]
    last = inputs["pixel_values_videos"][-256:].unflatten(1, (3, 2, 36))
    assert torch.equal(last[:, :, 0], last[:, :, 1])


def test_marks_and_videos_must_agree():
    frames = show_clip(0, "test", 0).frames
    with pytest.raises(ValueError, match="have 1 <video> marks for 2 videos"):
        encode([frames, frames], ["<video> how many stars ? :"])
    assert with_marks(build_processor(), "<video> ? :") == "<video> ? :"


def test_pictures_and_videos_share_a_prompt():
    processor, frames = build_qwen_processor(), show_clip(0, "test", 0).frames
    inputs = processor(
        images=[Image.fromarray(frames[0])],
        videos=[frames[:2]],
        text=[with_marks(processor, "<image> <video> ? :")],
        return_tensors="pt",
    )
    assert [int((inputs["mm_token_type_ids"] == kind).sum()) for kind in (1, 2)] == [64, 64]
    # the same picture twice is a video of one step
    assert inputs["pixel_values"].shape == inputs["pixel_values_videos"].shape


# --- packing


@pytest.mark.slow
def test_each_packed_question_equals_the_question_alone():
    """Positions in time, too: the model finds its own for the lone question."""
    model, batch = tiny(), ClipStream(QWEN, 0, 1, 7, 1)[ROUND.index("clip")]
    for_training(model)
    with torch.no_grad():
        packed = model.lm_head(QWEN.hidden_clips(model, batch))[0]
    for_inference(model)
    first = batch.prefix
    shown = encode(batch.pixels.numpy(), ["<video>"])
    assert shown["input_ids"][0].tolist() == batch.input_ids[0, :first].tolist()
    names = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    inputs = {name: shown[name] for name in names}
    groups = batch.group[0].unique().tolist()
    assert len(groups) > 12
    for group in groups[2:8]:  # after padding (-2) and prefix (-1)
        at = (batch.group[0] == group).nonzero().flatten()
        ids = torch.cat([batch.input_ids[0, :first], batch.input_ids[0, at]])[None]
        kinds = 2 * (ids == model.config.video_token_id).int()
        with torch.no_grad():
            alone = model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits[0, first:]
        torch.testing.assert_close(packed[at], alone, atol=2e-5, rtol=0)


def test_steps_of_a_clip_are_apart_in_time():
    positions = QWEN.clip_prefix(STEPS, 8).positions
    assert positions.shape == (3, 3 + 64 * STEPS)
    assert positions[0, 2:-1].tolist() == [2 + step for step in range(STEPS) for _ in range(64)]
    assert (positions[:, -1] == 10).all()


def test_steps_take_turns_and_are_never_the_same():
    stream = ClipStream(QWEN, 0, 1, 7, 2)
    layouts = [stream.layout(number) for number in range(4)]
    assert layouts == ["clip", "clip", "single", "single"]
    clips, single = stream[0], stream[2]
    assert clips.pixels.shape == (1, 12, 96, 96, 3)
    assert len(single.pixels) == SINGLES
    assert single.dense is None
    assert (stream[1].pixels != clips.pixels).any()
    asked = {tuple(row.tolist()) for row in stream[0].input_ids}
    assert asked == {tuple(row.tolist()) for row in clips.input_ids}


# --- training and answers


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_iteration):
    out = tmp_path_factory.mktemp("start")
    model = tiny(2, 1)
    model.config.vision_config.tokens_per_second = 4  # as in checkpoints that know no videos
    export(model, out / "checkpoint")
    settings = {
        "architecture": "qwen2_5_vl",
        "start": out / "checkpoint",
        "episodes_batch": 1,
        "workers": 0,
        "questions": 2,
        "check_questions": 0,
    }
    return out / "run", settings, train_reference(out / "run", **settings, episodes_images=8)


@pytest.mark.slow
def test_stage_3_trains_on_clips_and_replays_pictures(trained):
    out, _, scores = trained
    assert set(CLIP_KINDS) < set(scores)
    assert len(scores) == 11
    last = json.loads((out / "clips" / "log.jsonl").read_text().splitlines()[-1])
    assert last["images"] == STEPS + SINGLES
    assert {"clip_loss", "clip", "single_loss", "single"} <= set(last)
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["vision_config"]["tokens_per_second"] == 1
    card = (out / "checkpoint" / "MODEL_CARD.md").read_text()
    assert "**Clips**, 8 images" in card
    assert "clip_change" in card
    assert not (out / "language").exists()


@pytest.mark.full
def test_it_goes_on_where_it_stopped(trained):
    out, settings, scores = trained
    before = (out / "clips" / "log.jsonl").read_text()
    assert train_reference(out, **settings, episodes_images=8) == scores
    train_reference(out, **settings, episodes_images=14)
    assert (out / "clips" / "log.jsonl").read_text().startswith(before)


@pytest.mark.slow
def test_a_start_of_another_architecture_is_refused(trained, tmp_path):
    _, settings, _ = trained
    export(build_model(reference_config(vision_layers=2, text_layers=1), seed=0), tmp_path / "c")
    with pytest.raises(ValueError, match="holds a 'llava', not a 'qwen2_5_vl'"):
        train_reference(tmp_path / "out", **settings | {"start": tmp_path / "c"})


@pytest.mark.full
def test_loss_falls_on_clips():
    model, batch = tiny(2, 2).train(), ClipStream(QWEN, 0, 1, 7, 1)[0]
    for_training(model)
    optimizer = make_optimizer(
        {**QWEN.parts(model), "language": model.model.language_model}, lr=2e-3
    )
    losses = []
    for _ in range(6):
        loss, _ = answer_loss(model, QWEN.hidden_clips(model, batch), batch, early=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch():
    model, processor = tiny(), build_qwen_processor()
    questions = held_out_clips("clip_change", 3)
    alone = clip_answers(model, processor, questions, batch=1)
    assert clip_answers(model, processor, questions) == alone
    scores = clip_accuracy(model, processor, n=1)
    assert tuple(scores) == CLIP_KINDS


@pytest.mark.slow
def test_the_shipped_model_answers_and_counts_seconds_as_it_was_trained_to():
    """At other positions in time it forgets which step comes first: 70 % in place of 100 %."""
    model, processor = load(architecture="qwen2_5_vl", clips=True)
    assert model.config.vision_config.tokens_per_second == TOKENS_PER_SECOND
    assert min(clip_accuracy(model, processor, n=8, seed=5).values()) > 0.9
