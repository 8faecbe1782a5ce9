"""Packed training computes what single questions compute."""

import numpy as np
import torch

from vispress.reference.model.architecture import ARCHITECTURES
from vispress.reference.model.checkpoint import for_inference, for_training
from vispress.reference.model.llava import build_model, normalise, reference_config
from vispress.reference.model.packing import SLOT, LanguageStream, pack
from vispress.reference.train.language import answer_loss
from vispress.reference.world.scenes import NUM_PATCHES
from vispress.reference.world.words import VOCABULARY

LLAVA = ARCHITECTURES["llava"]
PREFIX = 1 + NUM_PATCHES
WHERE = (("where is the ring ? :", "top left"),)


def tiny():
    return build_model(reference_config(vision_layers=2, text_layers=2), seed=0).eval()


def test_each_packed_question_equals_the_question_alone():
    model, batch = tiny(), LanguageStream(LLAVA, 0, 1, 7, 0)[0]
    for_training(model)
    with torch.no_grad():
        packed = model.lm_head(LLAVA.hidden(model, batch)[0])[0]
    for_inference(model)
    pixels = normalise(batch.dense.pixels)
    groups = batch.group[0].unique().tolist()
    assert len(groups) > 10
    for group in groups[2:]:  # after padding (-2) and prefix (-1)
        at = (batch.group[0] == group).nonzero().flatten()
        ids = torch.cat([batch.input_ids[0, :PREFIX], batch.input_ids[0, at]])[None]
        with torch.no_grad():
            alone = model(input_ids=ids, pixel_values=pixels).logits[0, PREFIX:]
        torch.testing.assert_close(packed[at], alone, atol=2e-5, rtol=0)


def test_labels_are_the_answer_and_the_end_and_early_labels_its_first_word():
    ids, positions, group, labels, early = pack([WHERE], 1)
    words = [VOCABULARY[i] for i in ids[PREFIX : PREFIX + 8]]
    assert words == ["where", "is", "the", "ring", "?", ":", "top", "left"]
    assert [VOCABULARY[i] for i in labels[PREFIX + 5 : PREFIX + 8]] == ["top", "left", "</s>"]
    assert [VOCABULARY[i] for i in early[PREFIX + 3 : PREFIX + 5]] == ["top", "top"]
    assert (labels >= 0).sum() == 3
    assert (early >= 0).sum() == 2
    assert positions[PREFIX : PREFIX + 8].tolist() == list(range(PREFIX, PREFIX + 8))
    assert (group[PREFIX + 8 :] == -2).all()


def test_questions_that_do_not_fit_are_left_out_whole():
    group = pack([WHERE] * 9, 2)[2]
    counts = np.bincount(group[group >= 0])
    assert counts.tolist() == [8] * (2 * SLOT // 8)


def test_loss_reads_first_word_accuracy_at_the_colon():
    model, batch = tiny(), LanguageStream(LLAVA, 0, 2, 7, 0)[0]
    for_training(model)
    hidden = LLAVA.hidden(model, batch)[0]
    late, hits = answer_loss(model, hidden, batch, early=False)
    both, _ = answer_loss(model, hidden, batch, early=True)
    assert both > late > 0
    assert 0 <= hits <= 1
