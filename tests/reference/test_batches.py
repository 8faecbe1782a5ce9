"""Every layout of stage 3 computes what its questions compute alone, conversations included."""

import pytest
import torch
from PIL import Image

from vispress.reference.evaluation.conversation import episode_accuracy, episode_answers
from vispress.reference.evaluation.episode_sets import held_out_episodes
from vispress.reference.model.checkpoint import for_inference, for_training
from vispress.reference.model.llava import build_model, normalise, reference_config
from vispress.reference.model.processor import build_processor
from vispress.reference.train.batches import COST, ROUND, EpisodeStream, shrink
from vispress.reference.train.episodes import embed_and_run, extend_vocabulary, see
from vispress.reference.world.words import EPISODE_KINDS, VOCABULARY, WORD_ID


def tiny():
    return build_model(reference_config(vision_layers=2, text_layers=2), seed=0).eval()


def batch_of(layout, pictures=6):
    stream = EpisodeStream(0, pictures, 1)
    assert stream.layout(ROUND.index(layout)) == layout
    return stream[ROUND.index(layout)]


@pytest.mark.some(cases=3)
@pytest.mark.parametrize("layout", sorted(COST))
def test_each_packed_thread_equals_the_thread_alone(layout):
    model, batch = tiny(), batch_of(layout)
    rows = len(batch.input_ids)
    for_training(model)
    with torch.no_grad():
        hidden = embed_and_run(
            model, batch, see(model, batch.pixels, train=False)
        ).last_hidden_state
        packed = model.lm_head(hidden)
    for_inference(model)
    pixels = normalise(batch.pixels).unflatten(0, (rows, -1))
    for row in {0, rows - 1}:
        groups = batch.group[row].unique().tolist()
        assert groups[-1] >= 0
        for group in [g for g in groups if g >= 0][:4]:
            at = (batch.group[row] == group).nonzero().flatten()
            ids = torch.cat([batch.input_ids[row, : batch.prefix], batch.input_ids[row, at]])[None]
            with torch.no_grad():
                alone = model(
                    input_ids=ids, pixel_values=pixels[row], interpolate_pos_encoding=True
                ).logits[0]
            torch.testing.assert_close(packed[row, at], alone[batch.prefix :], atol=3e-5, rtol=0)
        prefix = packed[row, : batch.prefix]
        torch.testing.assert_close(prefix, alone[: batch.prefix], atol=3e-5, rtol=0)


def test_a_conversation_never_reads_the_end_but_predicts_it():
    batch = batch_of("talk")
    assert (batch.input_ids != WORD_ID["</s>"]).all()
    at = (batch.group[0] == batch.group[0].max()).nonzero().flatten()
    words = [VOCABULARY[i] for i in batch.input_ids[0, at]]
    labels = [VOCABULARY[i] if i >= 0 else "" for i in batch.labels[0, at]]
    colons = [i for i, word in enumerate(words) if word == ":"]
    assert len(colons) == 3
    for colon in colons:
        assert labels[colon] == words[colon + 1]
        assert labels[colon + 1] == "</s>"
    assert sum(map(bool, labels)) == 6


def test_answers_of_examples_are_asked_for():
    batch = batch_of("in_context")
    head, labels = batch.input_ids[:, : batch.prefix], batch.labels[:, : batch.prefix]
    at = (head == WORD_ID[":"]).nonzero()
    assert len(at) == 2 * len(head)
    for row, place in at.tolist():
        assert labels[row, place] == head[row, place + 1]
    assert (labels >= 0).sum() == len(at)


def test_layouts_are_the_same_in_all_processes_and_replay_enough():
    stream = EpisodeStream(0, 4, 2)
    assert all(stream.layout(2 * step) == stream.layout(2 * step + 1) for step in range(20))
    assert sum(layout in ("single", "talk", "small") for layout in ROUND) >= 0.4 * len(ROUND)


def test_small_pictures_are_whole_patches_of_the_same_scene():
    pixels = batch_of("single").pixels
    small = shrink(pixels, 5, 9)
    assert small.shape == (len(pixels), 40, 72, 3)
    assert small.dtype == torch.uint8
    apart = small.float().mean((1, 2)) - pixels.float().mean((1, 2))
    assert apart.abs().max() < 3


def test_gradients_reach_the_encoder_from_single_pictures_only():
    model, batch = tiny().train(), batch_of("single")
    table = model.model.vision_tower.embeddings.position_embedding.weight
    see(model, batch.pixels, train=False).sum().backward()
    assert table.grad is None
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None
    see(model, batch.pixels, train=True).sum().backward()
    assert table.grad is not None


def test_new_words_are_added_and_old_ones_kept():
    config = reference_config(vision_layers=2, text_layers=1)
    config.text_config.vocab_size -= 7
    model = build_model(config, seed=0)
    old = model.get_input_embeddings().weight.detach().clone()
    assert extend_vocabulary(model) == 7
    words = model.get_input_embeddings().weight
    assert torch.equal(words[:-7], old)
    assert words.shape[0] == model.config.text_config.vocab_size == len(VOCABULARY)
    assert model.lm_head.weight is words
    assert 0.2 < words[-7:].std() / old.std() < 1
    assert extend_vocabulary(model) == 0


def recomputed(model, processor, episode):
    """A conversation answered without any cache: each turn reads the whole text anew."""
    text, answers = episode.prompt, []
    for later in (*(t for t, _ in episode.followups), None):
        image = Image.fromarray(episode.images[0])
        inputs = processor(images=image, text=[text], return_tensors="pt")
        with torch.no_grad():
            best = int(model(**inputs, use_cache=False).logits[0, -1].argmax())
        answers.append(VOCABULARY[best])
        text = f"{text} {answers[-1]} {later}"
    return " / ".join(answers)


def test_a_kept_cache_answers_as_a_whole_reading_does_alone_and_in_a_batch():
    # seed 4: answers that differ between turns and episodes
    model = build_model(reference_config(vision_layers=2, text_layers=2), seed=4).eval()
    processor, episodes = build_processor(), held_out_episodes("multi_turn", 4)
    whole = [recomputed(model, processor, e) for e in episodes]
    assert episode_answers(model, processor, episodes) == whole
    assert episode_answers(model, processor, episodes, batch=1) == whole
    assert len(set(whole)) > 2


def test_accuracy_is_given_for_every_kind():
    scores = episode_accuracy(tiny(), build_processor(), n=2)
    assert tuple(scores) == EPISODE_KINDS
    assert all(0 <= score <= 1 for score in scores.values())
