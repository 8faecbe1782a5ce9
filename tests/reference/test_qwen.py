"""The Qwen2.5-VL reference: encoder, labels, packing, processor, checkpoint, training."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vispress.bench.model.loaded_model import load_named_model
from vispress.errors import CheckpointError, ConfigError
from vispress.reference import KINDS, heldout, load, train_reference
from vispress.reference.evaluation.evaluate import accuracy, generate_answers, held_out
from vispress.reference.folders import SHIPPED_QWEN
from vispress.reference.model.architecture import ARCHITECTURES
from vispress.reference.model.checkpoint import (
    export,
    for_inference,
    for_training,
    read,
)
from vispress.reference.model.packing import LanguageStream
from vispress.reference.model.processor import build_processor, build_qwen_processor, with_marks
from vispress.reference.model.qwen import QWEN_VOCABULARY, encode_qwen
from vispress.reference.model.qwen_data import SIDES, collate_tokens, resize, side_of, token_labels
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.words import (
    COLOR_WORDS,
    COLORS,
    DOT_WORDS,
    SHAPES,
    VOCABULARY,
    WHAT_WORDS,
)

QWEN = ARCHITECTURES["qwen2_5_vl"]
needs_shipped = pytest.mark.skipif(not SHIPPED_QWEN.exists(), reason="no checkpoint is built in")


def tiny(vision_layers=3, text_layers=3):
    config = {"vision_layers": vision_layers, "text_layers": text_layers}
    return QWEN.build(config, 0).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "checkpoint"
    export(tiny(2, 1), out)
    return out


def encode(processor, image, prompt="<image> where is the ring ? :"):
    return processor(images=[image], text=[with_marks(processor, prompt)], return_tensors="pt")


# --- model


def test_the_model_is_a_qwen_with_windows_tied_words_and_grouped_heads():
    model = QWEN.build({}, 0)
    vision, text = model.config.vision_config, model.config.text_config
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert vision.fullatt_block_indexes == [2, 4]
    assert vision.window_size // vision.patch_size // vision.spatial_merge_size == 4
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // 6 // 2
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert QWEN_VOCABULARY[: len(VOCABULARY)] == VOCABULARY
    assert len(QWEN_VOCABULARY) == text.vocab_size
    again = QWEN.build({}, 0).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("side", SIDES)
def test_batched_windows_compute_what_the_model_computes(side):
    """Also where the picture's edge cuts windows: 84, 108 and 120 pixels."""
    model = tiny()
    pixels = torch.randint(0, 256, (2, 12 * side, 12 * side, 3), dtype=torch.uint8)
    processor = build_qwen_processor().image_processor
    inputs = processor(images=[p.numpy() for p in pixels], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2 * side, 2 * side]] * 2
    with torch.no_grad():
        theirs = model.model.get_image_features(**inputs).pooler_output
        ours = encode_qwen(model, pixels)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=0)


def test_windows_do_not_see_each_other_but_full_attention_does():
    model = tiny(vision_layers=3)
    pixels = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    other = pixels.clone()
    other[:, 90:, 90:] = 255
    for layers, reaches in (([], False), ([2], True)):
        model.model.visual.fullatt_block_indexes = layers
        with torch.no_grad():
            change = (encode_qwen(model, pixels) - encode_qwen(model, other)).abs().amax(-1)[0]
        assert bool(change.view(8, 8)[:4, :4].max() > 0) is reaches
        assert change.view(8, 8)[4:, 4:].min() > 0


# --- labels


def test_labels_of_tokens_name_what_is_there():
    for index in range(20):
        scene = draw_scene(0, "train", index)
        for side in SIDES:
            what, color, dot, center = token_labels(scene, side)
            assert len(what) == side * side
            assert center.sum() == len(scene.items)
            for item in scene.items:
                token = int(item.y * side / 96) * side + int(item.x * side / 96)
                assert center[token] == 1
                if item.kind != "sign":
                    name = SHAPES[item.value] if item.kind == "shape" else str(item.value)
                    assert WHAT_WORDS[what[token]] == name
                    assert COLOR_WORDS[color[token]] == COLORS[item.color]
                    assert DOT_WORDS[dot[token]] == (
                        COLORS[item.dot] if item.dot >= 0 else "nothing"
                    )
            named = {WHAT_WORDS[w] for w in what} - {"nothing"}
            assert named <= {WHAT_WORDS[w] for w in scene.what} | {"nothing"}


def test_a_sign_keeps_the_order_of_its_digits():
    scene = next(
        s
        for s in (draw_scene(0, "train", i) for i in range(50))
        if s.items[-1].kind == "sign" and s.items[-1].value % 11
    )
    what, color, _, _ = token_labels(scene, 8)
    tens, units = divmod(scene.items[-1].value, 10)
    for word, digit in (("first", tens), ("last", units)):
        found = {WHAT_WORDS[w] for w in what[color == COLOR_WORDS.index(word)]}
        assert found == {str(digit)}


def test_a_step_has_one_size_and_most_steps_the_usual_one():
    sides = [side_of(0, step) for step in range(400)]
    assert set(sides) == set(SIDES)
    assert 0.65 < np.mean(np.array(sides) == 8) < 0.85
    scenes = [draw_scene(0, "train", i) for i in range(2)]
    for side in SIDES:
        batch = collate_tokens(scenes, side)
        assert batch.pixels.shape == (2, 12 * side, 12 * side, 3)
        assert batch.what.shape == batch.center.shape == (2, side * side)
    assert (resize(scenes[0].pixels, 96) == scenes[0].pixels).all()


# --- packing


@pytest.mark.parametrize("number", [0, 3], ids=["96 pixels", "108 pixels"])
def test_each_packed_question_equals_the_question_alone(number):
    """Positions in time, rows and columns, too: the model finds its own for the lone question."""
    model, batch = tiny(), LanguageStream(QWEN, number, 1, 7, 0)[0]
    for_training(model)
    with torch.no_grad():
        packed = model.lm_head(QWEN.hidden(model, batch)[0])[0]
    for_inference(model)
    pixels = batch.pixels
    assert pixels.shape[1] == (96 if number == 0 else 108)
    inputs = build_qwen_processor().image_processor(images=[pixels[0].numpy()], return_tensors="pt")
    first = batch.prefix
    groups = batch.group[0].unique().tolist()
    assert len(groups) > 10
    for group in groups[2:]:  # after padding (-2) and prefix (-1)
        at = (batch.group[0] == group).nonzero().flatten()
        ids = torch.cat([batch.input_ids[0, :first], batch.input_ids[0, at]])[None]
        kinds = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            alone = model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits[0, first:]
        torch.testing.assert_close(packed[at], alone, atol=2e-5, rtol=0)


def test_the_prefix_is_what_the_processor_makes():
    processor = build_qwen_processor()
    for side in SIDES:
        image = Image.new("RGB", (12 * side, 12 * side))
        ids = encode(processor, image)["input_ids"][0].tolist()
        prefix = QWEN.prefix(side).ids
        assert ids[: len(prefix)] == prefix
        words = [QWEN_VOCABULARY[i] for i in ids[len(prefix) :]]
        assert " ".join(words) == "where is the ring ? :"


def test_dense_loss_reads_places_from_the_decoder_alone():
    model, batch = tiny(), LanguageStream(QWEN, 0, 2, 2, 0)[0]
    for_training(model)
    heads = QWEN.heads()
    words = model.get_input_embeddings().weight
    _, seen = QWEN.hidden(model, batch)
    _, scores = heads(seen, words, batch.dense)
    assert "place" in scores
    assert "content" not in scores
    _, scores = heads(QWEN.look(model, batch.pixels), words, batch.dense)
    assert "place" not in scores


# --- processor and checkpoint


def test_the_processor_needs_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    inputs = encode(build_qwen_processor(), Image.new("RGB", (96, 96)))
    assert inputs["pixel_values"].shape == (256, 3 * 2 * 36)


@pytest.mark.parametrize(
    ("size", "tokens"), [((84, 120), 70), ((97, 95), 64), ((48, 48), 49), ((480, 480), 100)]
)
def test_pictures_have_tokens_by_their_size(size, tokens):
    inputs = encode(build_qwen_processor(), Image.new("RGB", size))
    assert int(inputs["mm_token_type_ids"].sum()) == tokens


def test_marks_are_put_around_pictures_of_qwen_only():
    prompt = "<image> or <image> ? :"
    marked = with_marks(build_qwen_processor(), prompt)
    assert marked == "<vision><image></vision> or <vision><image></vision> ? :"
    assert with_marks(build_processor(), prompt) == prompt


def test_export_and_read_round_trip(folder):
    model, processor = read(folder, dtype=torch.float16)
    original = tiny(2, 1).half().state_dict()
    assert all(torch.equal(model.state_dict()[key], original[key]) for key in original)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.training
    image, prompt, _, _ = heldout("where", 1)[0]
    ours, theirs = (encode(p, image, prompt) for p in (processor, build_qwen_processor()))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json"])
@pytest.mark.parametrize("share", [0, 2], ids=["missing", "truncated"])
def test_a_damaged_checkpoint_is_named(folder, tmp_path, name, share):
    copy = shutil.copytree(folder, tmp_path / "c")
    whole = (copy / name).read_bytes()
    (copy / name).unlink()
    if share:
        (copy / name).write_bytes(whole[: len(whole) // share])
    with pytest.raises(CheckpointError, match=name if not share else "damaged"):
        read(copy)


def test_another_kind_of_model_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "c")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(CheckpointError, match="'qwen3_vl' is none of"):
        read(copy)


def test_unknown_architectures_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'gpt'"):
        load(architecture="gpt")
    with pytest.raises(ValueError, match="'gpt'"):
        train_reference(tmp_path, architecture="gpt")
    with pytest.raises(ConfigError, match="reference-qwen"):
        load_named_model("reference-gpt")


# --- training and answers


@pytest.mark.full
def test_the_same_script_trains_it(tmp_path):
    settings = {
        "architecture": "qwen2_5_vl",
        "vision_images": 8,
        "language_images": 8,
        "episodes_images": 8,
        "vision_batch": 4,
        "language_batch": 4,
        "episodes_batch": 1,
        "workers": 0,
        "questions": 1,
        "check_questions": 0,
        "config": {"vision_layers": 2, "text_layers": 1},
    }
    scores = train_reference(tmp_path, **settings)
    assert len(scores) == 11
    card = (tmp_path / "checkpoint" / "MODEL_CARD.md").read_text()
    assert "Qwen2_5_VLForConditionalGeneration" in card
    assert "--architecture qwen2_5_vl" in card
    assert (tmp_path / "curves.png").stat().st_size > 1000
    subject = load_named_model(str(tmp_path / "checkpoint"))
    assert type(subject.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    with pytest.raises(ConfigError, match="architecture"):
        train_reference(tmp_path, **settings | {"architecture": "llava"})


@pytest.mark.slow
@needs_shipped
def test_the_shipped_model_answers_at_every_resolution():
    model, processor = load(architecture="qwen2_5_vl")
    assert sum(f.stat().st_size for f in SHIPPED_QWEN.iterdir()) < 10 << 20
    assert (SHIPPED_QWEN / "MODEL_CARD.md").exists()
    scores = accuracy(model, processor, n=4, seed=5)
    assert sum(scores.values()) / len(scores) > 0.4
    examples = held_out("attribute", 12, seed=6)
    for side in SIDES:
        sized = [type(e)(e.image.resize((12 * side, 12 * side)), e.question) for e in examples]
        answers = generate_answers(model, processor, sized)
        right = np.mean([a == e.question.answer for a, e in zip(answers, examples, strict=True)])
        assert right > 0.5, side


@needs_shipped
@pytest.mark.parametrize("name", ["reference-qwen", "reference-qwen-clips"])
def test_the_benchmark_takes_it_by_name(name):
    subject = load_named_model(name)
    assert subject.name == name
    assert subject.model.config.model_type == "qwen2_5_vl"


@pytest.mark.slow
@needs_shipped
def test_the_one_that_has_seen_clips_answers_about_pictures_too():
    model, processor = load(architecture="qwen2_5_vl", clips=True)
    assert sum(accuracy(model, processor, n=4, seed=5).values()) / len(KINDS) > 0.8
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        load(clips=True)


def test_packed_attention_shares_keys_between_groups_of_heads():
    from vispress.reference.model.attention import packed_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.zeros(1, 1, 4, 4).masked_fill_(torch.ones(4, 4).triu(1).bool(), -1e30)
    ours, _ = packed_attention(torch.nn.Identity(), q, k, v, mask, 8**-0.5)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
