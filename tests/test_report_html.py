"""Reports in notebooks: a table and rasters, over pictures where they are given."""

import re

import pytest

from tests.bench.html_checks import faults
from tests.laws.table import logits_of, model_of
from tests.tiny import Image, Sample, Text, make_inputs
from tests.tiny_checkpoints import picture
from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.errors import ConfigError

SAMPLES = [Sample([Text(2), Image(), Text(3)]), Sample([Image(), Text(2), Image(), Text(2)])]


@pytest.fixture(scope="module")
def report():
    model = model_of("llava")
    with compressed(model, "divprune", keep_ratio=0.5):
        logits_of(model, make_inputs("llava", SAMPLES, padding="left"))
        return compression_report(model)


def test_a_notebook_shows_a_table_and_every_raster(report):
    text = report._repr_html_()
    assert faults(f"<!doctype html><title>t</title>{text}") == []
    images = [image for sample in report.samples for image in sample.images]
    assert text.count("<svg") == text.count("<tr><td>") == len(images) == 3
    for image, dropped in zip(images, re.findall(r'<path d="([^"]*)"', text), strict=True):
        assert dropped.count("M") == image.num_visual - image.num_kept
    assert "mean over layers 0.500" in text
    assert "<image" not in text


def test_pictures_lie_under_what_was_dropped(report):
    text = report.over([picture(30, 20, n) for n in range(3)])._repr_html_()
    assert text.count('<image href="data:image/jpeg;base64,') == 3
    with pytest.raises(ConfigError, match="has 3 images, got 1 pictures"):
        report.over([picture(8, 8, 0)])


def test_a_scoped_view_shows_its_report():
    model = model_of("llava")
    with compressed(model, "divprune", keep_ratio=0.5) as view:
        assert repr(view).startswith("<no report: ")
        assert view._repr_html_().startswith("<p>no report: ")
        logits_of(model, make_inputs("llava", SAMPLES, padding="left"))
    assert repr(view) == f"<report of the last prefill>\n{view.report}"
    assert view._repr_html_() == view.report._repr_html_()


@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"num_tokens": 4096}], ids=str)
def test_a_budget_that_changes_nothing_is_noted(budget):
    model = model_of("llava")
    compress_model(model, "divprune", **budget)
    try:
        logits_of(model, make_inputs("llava", SAMPLES, padding="left"))
        (note,) = compression_report(model).notes
        assert "divprune: dropped nothing in this call" in note
    finally:
        remove_compression(model)
