"""Late-step pruning on a tiny random bidirectional model, against the same model with masks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vispress.diffusion import LateSteps, denoise
from vispress.errors import BudgetError, ConfigError
from vispress.flops import flops

WIDTH, VOCAB, MASK, HEADS = 16, 23, 22, 2
SIZES: dict[str, Any] = {"mask_id": MASK, "length": 8, "block": 4, "steps": 8}


class Tiny(nn.Module):
    """Two bidirectional layers with rotary-like positions; can leave keys out by position."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.table, self.head = draw(VOCAB, WIDTH), draw(WIDTH, VOCAB)
        self.layers = [[draw(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(4)] for _ in range(2)]
        self.gone: Tensor | None = None
        self.seen: list[Tensor] = []

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rates = torch.arange(1, WIDTH + 1, dtype=torch.float64) / WIDTH
        turn = (positions[..., None] * rates).cos()
        for q, k, v, w in self.layers:
            scores = ((x @ q) * turn) @ ((x @ k) * turn).mT / WIDTH**0.5
            if self.gone is not None:
                hidden = self.gone.gather(1, positions)
                scores = scores.masked_fill(hidden[:, None], -torch.inf)
            x = x + scores.softmax(-1) @ (x @ v)
            x = x + (x @ w).tanh()
        logits = x @ self.head
        self.seen.append(logits[:, -8:])
        return logits, x


def prompt(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    before, after = (torch.randint(0, MASK, (batch, n), generator=g) for n in (3, 4))
    return before, torch.randn(batch, 12, WIDTH, generator=g, dtype=torch.float64), after


def test_published_schedule() -> None:
    assert LateSteps().counts(100, 32) == (100,) * 16 + (25,) * 16
    assert LateSteps(start_fraction=0.25).counts(10, 8) == (10,) * 2 + (2,) * 6  # round(2.5)
    assert LateSteps(start_fraction=0.0, keep_ratio=0.1).counts(20, 3) == (2, 2, 2)
    assert LateSteps().counts(0, 4) == (0, 0, 0, 0)


def test_progressive_falls_in_quarters() -> None:
    # start 4 of 16: steps 4, 8 and 12 of 15 - 4 = 11
    ratios = [1 - 0.75 * (step - 4) / 11 for step in (4, 8, 12)]
    expected = [100] * 4 + [round(100 * r) for r in ratios for _ in range(4)]
    assert LateSteps(start_fraction=0.25, progressive=True).counts(100, 16) == tuple(expected)
    last = LateSteps(start_fraction=0.9, progressive=True)
    assert last.counts(100, 4) == (100, 100, 100, 25)


def test_selection_is_greedy_from_a_drawn_token() -> None:
    # golden vectors of the specification: DivPrune picks 5, 6, 2, 7 from its own start
    v = [
        (1, 0, 0), (0.9, 0.1, 0), (0, 1, 0), (0, 0.9, 0.2),
        (0, 0, 1), (0.6, 0.5, 0.4), (-0.2, 0.1, 0.9), (0.7, -0.1, 0.1),
    ]  # fmt: skip
    states = torch.tensor([v] * 2, dtype=torch.float64)
    firsts = {}
    for seed in range(40):
        chosen = LateSteps(seed=seed).select(states, 4)
        assert torch.equal(chosen[0], chosen[1])
        g = torch.Generator().manual_seed(seed)
        firsts[int(torch.randint(8, (1,), generator=g))] = chosen[0].tolist()
    assert firsts[5] == [2, 5, 6, 7]
    assert all(first in kept for first, kept in firsts.items())


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.25, 0.5])
def test_pruned_steps_equal_steps_with_masks(start: float, progressive: bool) -> None:
    schedule = LateSteps(start_fraction=start, keep_ratio=0.25, progressive=progressive)
    before, visual, after = prompt()
    short, masked = Tiny(), Tiny()
    out = denoise(short, short.embed, before, visual, after, **SIZES, schedule=schedule)
    # the same course on all rows: which keys are left out is found from the masked run's own states
    counts, dropped = schedule.counts(12, 8), torch.zeros(2, 12, dtype=torch.bool)

    def run(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        step = len(masked.seen)
        if counts[step] < int((~dropped[0]).sum()):
            states = visual if step == 0 else run.states[:, 3:15]  # type: ignore[attr-defined]
            for b in range(2):
                left = (~dropped[b]).nonzero()[:, 0]
                keep = schedule.select(states[b : b + 1, left], counts[step])[0]
                dropped[b] = True
                dropped[b, left[keep]] = False
        masked.gone = torch.zeros_like(positions, dtype=torch.bool)
        masked.gone[:, 3:15] = dropped
        logits, run.states = masked(x, positions)  # type: ignore[attr-defined]
        return logits, run.states  # type: ignore[attr-defined]

    expected = denoise(run, masked.embed, before, visual, after, **SIZES)
    assert torch.equal(out.tokens, expected.tokens)
    for one, two in zip(short.seen, masked.seen, strict=True):
        torch.testing.assert_close(one, two)
    assert out.kept.tolist() == [(~own).nonzero()[:, 0].tolist() for own in dropped]
    assert out.lengths == tuple(3 + n + 4 + 8 for n in counts)


def test_every_place_is_filled_and_each_step_fills_its_share() -> None:
    before, visual, after = prompt()
    model, opened = Tiny(), []

    def watched(ids: Tensor) -> Tensor:
        if ids.shape[1] == 8:
            opened.append((ids == MASK).sum(1).tolist())
        return model.embed(ids)

    sizes = SIZES | {"steps": 6, "length": 8, "block": 4}
    out = denoise(model, watched, before, visual, after, **sizes)
    assert [count for count, _ in opened] == [8, 6, 5, 4, 2, 1]  # 2, 1, 1 a block
    assert not bool((out.tokens == MASK).any())
    assert out.flops(2, 16, 32) == 6 * flops([27, 27], 16, 32, "fastv2")


def test_the_surest_place_is_filled_first() -> None:
    before, visual, after = prompt(1)
    model = Tiny()
    ids = []
    sizes = SIZES | {"block": 8}
    denoise(model, lambda i: (ids.append(i), model.embed(i))[1], before, visual, after, **sizes)
    answers = [i for i in ids if i.shape[1] == 8]
    probability = model.seen[0][0].clone()
    probability[:, MASK] = -torch.inf
    sure = probability.softmax(-1).amax(-1)
    assert (answers[1][0] != MASK).nonzero().flatten().tolist() == [int(sure.argmax())]


def test_logits_are_not_written_to_and_the_mask_is_no_answer() -> None:
    before, visual, after = prompt(1)
    always = torch.zeros(1, 27, VOCAB)
    always[..., MASK], always[..., 5] = 9.0, 1.0
    copy = always.clone()
    out = denoise(
        lambda x, p: (always, x), Tiny().embed, before, visual, after, **(SIZES | {"steps": 2})
    )
    assert out.tokens.tolist() == [[5] * 8]
    assert torch.equal(always, copy)


def test_keeping_all_changes_nothing_and_a_batch_is_its_samples() -> None:
    before, visual, after = prompt()
    plain, kept = (
        denoise(m := Tiny(), m.embed, before, visual, after, **SIZES, schedule=s)
        for s in (None, LateSteps(keep_ratio=1.0))
    )
    assert torch.equal(plain.tokens, kept.tokens)
    together = denoise(m := Tiny(), m.embed, before, visual, after, **SIZES, schedule=LateSteps())
    for b in range(2):
        one = slice(b, b + 1)
        alone = denoise(
            m := Tiny(), m.embed, before[one], visual[one], after[one], **SIZES,
            schedule=LateSteps(),
        )  # fmt: skip
        assert torch.equal(alone.tokens, together.tokens[one])
        assert torch.equal(alone.kept, together.kept[one])


def test_bad_arguments_are_refused() -> None:
    for bad in ({"start_fraction": 1.0}, {"seed": -1}, {"progressive": 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            LateSteps(**bad)
    with pytest.raises(BudgetError, match="keep_ratio"):
        LateSteps(keep_ratio=0.0)
    model = Tiny()
    for bad, match in (
        ({"block": 3}, "block must divide"),
        ({"steps": 3}, "multiple of the 2 blocks"),
        ({"steps": 16}, "at most length=8"),
    ):
        with pytest.raises(ConfigError, match=match):
            denoise(model, model.embed, *prompt(), **(SIZES | bad))
