"""TransPrune: the score, by hand (its schedule: `test_schedules.py`)."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens

from vispress.errors import ConfigError
from vispress.methods import TransPrune
from vispress.methods.transprune import summed_variation
from vispress.types import Transition


def transition(cosine, magnitude, *, padding=0):
    """One module's values; the other one does nothing. Padding comes before the sequence."""
    cosine, magnitude = (torch.tensor([[v, [0.0] * len(v)]]) for v in (cosine, magnitude))
    whole = torch.cat([torch.full((1, 2, padding), -1.0), cosine], dim=2)
    return Transition(
        layer=0,
        magnitude=magnitude,
        cosine=cosine,
        sequence_cosine=whole,
        sequence_valid=torch.arange(whole.shape[2])[None] >= padding,
    )


COSINE, MAGNITUDE = [0.1, 0.5, -0.2], [1.2, 0.8, 0.5]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("signed", [0.3973, 0.1776, 0.2235]), ("abs", [0.4660, 0.2082, 0.1757])],
)
def test_worked_example_of_both_readings(direction, expected):
    ours = summed_variation([transition(COSINE, MAGNITUDE)], direction)
    torch.testing.assert_close(ours, torch.tensor([expected]), rtol=0, atol=5e-5)


def test_padding_takes_no_part_in_the_softmax():
    bare = summed_variation([transition(COSINE, MAGNITUDE)], "signed")
    padded = summed_variation([transition(COSINE, MAGNITUDE, padding=3)], "signed")
    torch.testing.assert_close(padded, bare)


def test_text_shares_the_softmax_and_the_two_modules_add():
    tokens = make_tokens(1, 5, transitions=(3,))
    (step,) = tokens.transition
    by_hand = torch.zeros(5)
    for module in range(2):
        valid = step.sequence_cosine[0, module][step.sequence_valid[0]]
        weight = (1 - step.cosine[0, module]).exp() / (1 - valid).exp().sum()
        by_hand += step.magnitude[0, module] * weight
    torch.testing.assert_close(summed_variation([step], "signed")[0], by_hand)


def test_score_is_a_mean_of_two_shares_of_one():
    tokens = make_tokens(2, 9)
    torch.testing.assert_close(TransPrune().score(tokens).sum(dim=1), torch.ones(2))
    parts = [TransPrune(alpha=alpha).score(tokens) for alpha in (1.0, 0.0, 0.3)]
    torch.testing.assert_close(parts[2], 0.3 * parts[0] + 0.7 * parts[1])


def test_without_text_behind_the_image_transitions_alone_decide():
    tokens = make_tokens(2, 9)
    mute = replace(tokens, query_attention=tokens.query_attention[:, :, :0], rotary_prior=None)
    assert torch.equal(TransPrune().score(mute), TransPrune(alpha=1.0).score(tokens))
    assert not TransPrune().score(mute).isnan().any()


@pytest.mark.refusal
@pytest.mark.parametrize(
    "bad",
    [
        {"preset": "middle"},
        {"direction": "both"},
        {"alpha": 1.5},
        {"alpha": float("nan")},
        {"transition_layers": (3, 2)},
        {"transition_layers": (-1,)},
    ],
    ids=str,
)
def test_bad_hyper_parameters_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TransPrune(**bad)


def test_layers_with_the_same_rows_are_added_like_the_others():
    one, two, other = (
        make_tokens(2, 7, seed=seed, transitions=(1,)).transition[0] for seed in range(3)
    )
    shared = replace(two, sequence_valid=one.sequence_valid)
    apart = [summed_variation([step], "signed") for step in (one, shared, other)]
    together = summed_variation([one, shared, other], "signed")
    torch.testing.assert_close(together, sum(apart))
