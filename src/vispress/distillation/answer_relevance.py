"""XAI compression's lesson: how relevant each token was for the model's own right answer.

Relevance is rolled out over the layers: a layer's attention times its positive gradient, a mean
over heads, takes relevance from what a position looks at, and the residual stream keeps the rest.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.adapters.eager import eager_attention
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.distillation.distil import Curve, learn
from vispress.distillation.lessons import Lesson, Pupil
from vispress.distillation.own_answers import IGNORED, answered, with_answers
from vispress.methods.base import upcast

ZEROED = 0.5
"""Share of an image's tokens, the least relevant ones, that count for nothing."""


@dataclass(frozen=True, eq=False)
class Relevant:
    """One image that was asked about, on the host.

    Args:
        attention: `[N]` fp32, that each token receives in the first decoder layer from the words
            behind the image.
        target: `[N]` fp32, its share of all relevance.
    """

    attention: Float[Tensor, "N"]
    target: Float[Tensor, "N"]


def relevance(
    maps: Sequence[Float[Tensor, "B H L L"]],
    gradients: Sequence[Float[Tensor, "B H L L"]],
    position: Int[Tensor, "B"],
) -> Float[Tensor, "B L"]:
    """Roll out what each position contributes to one, by gradients.

    The row `position` of R, where R begins as the identity and R + mean_h[(A * dy/dA)+] R follows
    it with every layer.

    Args:
        maps: Attention of each decoder layer, the first one first.
        gradients: Of what is explained, for each of them.
        position: Whose output is explained, in each sample.
    """
    row = nn.functional.one_hot(position, maps[0].shape[-1]).to(maps[0].dtype)
    for attention, gradient in zip(reversed(maps), reversed(gradients), strict=True):
        taken = (attention * gradient).clamp(min=0).mean(dim=1)
        row = row + (row[:, None] @ taken)[:, 0]
    return row


def label(found: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Zero the lower half of relevance, and scale the rest to 1 in all; 0 where there is none."""
    fewer = int(ZEROED * len(found))
    lowest = found.argsort(stable=True)[:fewer]
    kept = found.scatter(0, lowest, 0.0)
    return kept / kept.sum().clamp(min=torch.finfo(kept.dtype).tiny)


def explain(
    loaded: LoadedModel, prompts: Iterable[Prompt], *, batch_size: int = 8
) -> Iterator[Relevant]:
    """Explain answers, token by token, and give each image with its mean relevance.

    Images without words behind them, and answers that no visual token is relevant to, are left out.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With one picture each, and the model's own answer.
        batch_size: Prompts of a batch.
    """
    left = iter(prompts)
    with _explainable(loaded.model):
        while batch := list(islice(left, batch_size)):
            yield from _explained(loaded, batch)


def _explained(loaded: LoadedModel, batch: Sequence[Prompt]) -> Iterator[Relevant]:
    inputs = with_answers(loaded, batch)
    labels = inputs.pop("labels")
    with torch.enable_grad():
        out: Any = loaded.model(**inputs, output_attentions=True, use_cache=False)
    said = labels != IGNORED
    first, lengths = said.int().argmax(dim=1), said.sum(dim=1)
    total = torch.zeros(labels.shape, device=labels.device)
    for number in range(int(lengths.max())):
        there = number < lengths
        position = (first + number).clamp(max=labels.shape[1] - 1) - 1
        rows = torch.arange(len(labels), device=labels.device)
        word = labels[rows, position + 1].clamp(min=0)
        logit = out.logits[rows, position, word][there].sum()
        gradients = torch.autograd.grad(logit, out.attentions, retain_graph=True)
        maps = [upcast(one.detach()) for one in out.attentions]
        found = relevance(maps, [upcast(g) for g in gradients], position)
        total += found * there[:, None]
    mean = (total / lengths[:, None]).cpu()
    placeholder = find_adapter(loaded.model).placeholders()["image"]
    visual = (inputs["input_ids"] == placeholder).cpu()
    real = inputs["attention_mask"].bool().cpu() & ~said.cpu()
    received = upcast(out.attentions[0].detach()).mean(dim=1).cpu()
    for row, own in enumerate(visual):
        words = real[row].clone()
        words[: int(own.nonzero().max()) + 1] = False
        target = label(mean[row, own])
        if words.any() and float(target.sum()) > 0:
            yield Relevant(received[row][words][:, own].mean(dim=0), target)


@contextmanager
def _explainable(model: nn.Module) -> Iterator[None]:
    """Inside, attention maps are made, and have gradients even if the model is frozen."""
    adapter = find_adapter(model)
    parameters = list(adapter.decoder_layers[0].parameters())
    frozen = [one for one in parameters if not one.requires_grad]
    for one in frozen:
        one.requires_grad_(True)
    try:
        with eager_attention(adapter):
            yield
    finally:
        for one in frozen:
            one.requires_grad_(False)


def relevance_loss(module: nn.Module, batch: Sequence[Relevant]) -> Tensor:
    """Average the divergence of the scores' softmax from relevance, in nats.

    Args:
        module: Called with attention `[B, N]`.
        batch: Images of one size.
    """
    device = next(module.parameters()).device
    score: Tensor = module(torch.stack([one.attention for one in batch]).to(device))
    target = torch.stack([one.target for one in batch]).to(score)
    return nn.functional.kl_div(score.log_softmax(dim=-1), target, reduction="batchmean")


def teach(pupil: Pupil) -> Curve:
    """Explain the model's right answers, then move the network towards what was relevant."""
    advance, size = pupil.begin("answers", pupil.samples), pupil.batch_size
    own = answered(pupil.loaded, pupil.prompts, right=True, batch_size=size, advance=advance)
    heard = list(explain(pupil.loaded, own, batch_size=size))
    return learn(pupil, heard, relevance_loss)


LESSONS = (
    Lesson("xai_compress", "relevance", teach, "divergence from relevance", samples=1200, lr=1e-3),
)
