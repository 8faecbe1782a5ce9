"""The shipped compressors: small, of the shipped models, and better than diversity alone."""

import json

import pytest

from vispress import compress_model, compression_report, remove_compression, update_compression
from vispress.errors import ConfigError
from vispress.reference import compressor, heldout, load
from vispress.reference.evaluation.evaluate import generate_words
from vispress.reference.folders import COMPRESSORS


@pytest.mark.parametrize("architecture", COMPRESSORS)
def test_the_card_says_how_it_was_made_and_nothing_of_a_machine(architecture):
    folder = compressor(architecture=architecture)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    card = json.loads((folder / "vispress.json").read_text())
    assert card["base_model"] == ""
    made = card["data"]
    assert (made["samples"], made["steps"], made["seed"]) == (4000, 400, 0)
    curve = json.loads((folder / "curve.json").read_text())
    assert len(curve["loss"]) == made["steps"]
    before, behind = curve["held_out"]
    assert made["held_out"] == [round(before, 4), round(behind, 4)]
    assert behind < before / 3


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("architecture", COMPRESSORS)
def test_what_was_learned_finds_a_dot_in_few_tokens(architecture):
    model, processor = load(architecture=architecture)
    images, prompts, answers, _ = zip(*heldout("needle", 16, seed=5), strict=True)

    def right():
        words = generate_words(model, processor, list(prompts), batch=16, images=list(images))
        return sum(map(str.__eq__, words, answers))

    compress_model(model, config=compressor(architecture=architecture))
    update_compression(model, num_tokens=8)
    learned = right()
    report = compression_report(model)
    assert {image.num_kept for sample in report.samples for image in sample.images} == {8}
    assert not any("untrained" in note for note in report.notes)
    update_compression(model, weight=0.0)
    alone = right()
    remove_compression(model)
    assert learned >= 13
    assert alone <= learned - 3


@pytest.mark.refusal
def test_an_architecture_without_one_is_named():
    with pytest.raises(ConfigError, match="architecture must be one of 'llava', 'qwen2_5_vl'"):
        compressor(architecture="llava_next")
