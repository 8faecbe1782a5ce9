"""Answers that a harness scores: the prompt decides what is kept, whatever the answer is.

lmms-eval itself is run in tests/integrations; here a model class built as its own are stands in.
"""

import sys
import types
from typing import Any

import pytest
import torch

from tests.tiny_checkpoints import picture, save_checkpoint
from vispress import compression_report
from vispress.bench.model.checkpoints import load_checkpoint
from vispress.errors import ConfigError
from vispress.integrations.lmms_eval import compressed_class
from vispress.integrations.scoring import prompt_length

QUESTION, ANSWERS = "What is it?", (" yes", " a longer, other answer")


class Harness:
    """Scores as lmms-eval's LLaVA does: the whole's tokens, the prompt's, then a forward."""

    def __init__(self, pretrained: str = "") -> None:
        loaded = load_checkpoint(pretrained)
        self._model, self._image_processor = loaded.model, loaded.processor
        self.seen: list[dict[str, Any]] = []

    @property
    def model(self) -> Any:
        return self._model

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        scores = []
        for images, context, answer in requests:
            prompt = "<image>" * len(images) + "\n" + context
            text = [prompt + answer]
            whole = self._image_processor(text=text, images=images or None, return_tensors="pt")
            labels = whole["input_ids"].clone()
            alone = self._image_processor(text=[prompt], return_tensors="pt")["input_ids"]
            labels[:, : alone.shape[1]] = -100
            with torch.inference_mode():
                out = self.model(**whole, labels=labels)
            self.seen.append({"alone": alone, **whole})
            same = (out["logits"].argmax(-1)[0, -3:] == labels[0, -3:]).all()
            scores.append((float(out["loss"]), bool(same)))
        return scores


class Blind(Harness):
    """Makes no tokens of the prompt alone."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        ((images, context, answer),) = requests
        text = ["<image>\n" + context + answer]
        whole = self._image_processor(text=text, images=images, return_tensors="pt")
        self.model(**whole)
        return []


@pytest.fixture(scope="module")
def llava(tmp_path_factory: Any) -> str:
    return str(save_checkpoint("llava", tmp_path_factory.mktemp("checkpoint") / "llava"))


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What lmms-eval would be told of the throughput."""
    found: list[dict[str, float]] = []
    module: Any = types.ModuleType("lmms_eval.models.model_utils.gen_metrics")
    module.log_metrics = lambda *_, additional_metrics: found.append(additional_metrics)
    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.model_utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def requests(images: list[Any]) -> list[Any]:
    return [(images, QUESTION, answer) for answer in ANSWERS]


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_the_answer_has_no_say(llava: str, method: str, logged: list[dict[str, float]]) -> None:
    budget = {"keep_ratio": 0.3} if method == "fastv" else {}
    harness = compressed_class(Harness)(pretrained=llava, method=method, **budget)
    kept, images = [], [picture(9, 9, 0)]
    with torch.no_grad():  # what the prompt alone keeps
        prompt = harness._image_processor(
            text=["<image>\n" + QUESTION], images=images, return_tensors="pt"
        )
        harness.model(**prompt)
    expected = [p.kept for p in compression_report(harness.model).samples[0].images[0].placements]
    processor = harness._image_processor
    for request in requests(images):
        (_,) = harness.loglikelihood([request])
        report = compression_report(harness.model)
        kept.append([p.kept for p in report.samples[0].images[0].placements])
        assert torch.equal(harness.seen[-1]["alone"], prompt["input_ids"])
    assert kept == [expected, expected]
    assert harness._image_processor is processor
    assert logged[-1]["kept_at_end"] == len(expected[-1])


def test_uncompressed_scores_are_the_harnesss_own(llava: str) -> None:
    images = [picture(9, 9, 0)]
    ours = compressed_class(Harness)(pretrained=llava, method="none")
    found = ours.loglikelihood(requests(images))
    plain = Harness(llava)
    expected = []
    for call, answer in zip(ours.seen, ANSWERS, strict=True):
        labels = call["input_ids"].clone()
        assert labels[0, call["alone"].shape[1] :].tolist() == labels[0, -len(answer) :].tolist()
        labels[:, : -len(answer)] = -100
        inputs = {key: value for key, value in call.items() if key != "alone"}
        with torch.inference_mode():
            expected.append(float(plain.model(**inputs, labels=labels).loss))
    assert [score for score, _ in found] == expected
    assert (ours.kept.prompts, ours.kept.visual) == (2, 72)


def test_text_alone_and_several_pictures(llava: str) -> None:
    harness = compressed_class(Harness)(pretrained=llava, method="fastv", keep_ratio=0.3)
    images = [picture(9, 9, 0), picture(9, 9, 1)]
    mixed = [([], QUESTION, ANSWERS[0]), *requests(images), ([], QUESTION, ANSWERS[1])]
    found = harness.loglikelihood(mixed)
    assert [harness.loglikelihood([one])[0] for one in mixed] == found
    assert harness.kept.visual == 0  # of the last call


def test_a_harness_that_hides_its_prompts_is_refused(llava: str) -> None:
    harness = compressed_class(Blind)(pretrained=llava, method="fastv", keep_ratio=0.3)
    with pytest.raises(ConfigError, match=r"where the prompt ends is unknown.*generate"):
        harness.loglikelihood(requests([picture(9, 9, 0)])[:1])
    compressed_class(Blind)(pretrained=llava, method="none").loglikelihood(
        requests([picture(9, 9, 0)])[:1]
    )


@pytest.mark.parametrize(
    ("whole", "alone", "expected"),
    [
        ([1, 9, 9, 9, 4, 5, 6, 7], [1, 9, 4, 5], 6),
        ([1, 9, 9, 9, 4, 5, 6, 7], [1, 9, 9, 9, 4, 5], 6),
        ([1, 9, 9, 4, 9, 9, 5, 7], [1, 9, 4, 9, 5], 7),
        ([1, 9, 9, 4, 56, 7], [1, 9, 4, 5], 4),  # its last token joined the answer's first
    ],
)
def test_a_prompt_is_found_in_front_of_its_answer(
    whole: list[int], alone: list[int], expected: int
) -> None:
    assert prompt_length(whole, alone, frozenset({9})) == expected


def test_another_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt's 4 tokens.*token 1 differs"):
        prompt_length([1, 2, 3, 4, 5], [1, 9, 4, 5], frozenset({9}))
