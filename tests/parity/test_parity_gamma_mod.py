"""Gamma-MoD against vectors of the official code: ranks of maps, routed tokens, what leaves, loss.

The code routes all tokens of a prompt but its question; here what it may leave out stands for an
image, and the question for text that is protected and, other than there, not weighted.
"""

import torch
from tests.parity.vectors import close, each_case
from torch import nn

from vispress.methods import GammaMoD
from vispress.methods.gamma_mod import SharedRouter, arank
from vispress.types import VisualTokens, full_index


@each_case("gamma_mod", having="in/attention")
def test_ranks_of_maps(case):
    ranks = arank(case["in/attention"])
    assert ranks.tolist() == case["out/head_ranks"].tolist()
    assert float(ranks.mean()) == case["out/arank_f64"]


def tokens_of(case, count):
    """The first tokens as an image, with the official router."""
    features = case["in/hidden"][None, :count]
    router = SharedRouter(features.shape[-1])
    router.load_state_dict({"weight": case["in/router_w"]})
    return VisualTokens(
        features=features,
        index=full_index(1, count, features.device),
        num_original=count,
        module=router,
        input_norm=nn.Identity(),
    )


def left(case, kept, p):
    """What leaves a layer of two matrices in place of attention and MLP."""
    hidden = case["in/hidden"]
    middle = hidden + hidden @ case["in/attn_matrix"].mT
    ran = middle + p[:, None] * (middle @ case["in/mlp_matrix"].mT)
    runs = torch.zeros(len(hidden), dtype=torch.bool)
    runs[kept] = True
    return torch.where(runs[:, None], ran, hidden)


@each_case("gamma_mod", having="param/threshold")
def test_what_a_threshold_lets_run(case):
    tokens = tokens_of(case, len(case["in/hidden"]))
    plan = GammaMoD(threshold=case["param/threshold"]).plan(tokens, tokens.num_visual)
    close(plan.gate[0].detach(), case["out/prob"])
    assert plan.keep[0].tolist() == case["out/kept_sorted"].tolist()
    close(left(case, plan.keep[0], plan.gate[0].detach()), case["out/hidden_out"])


@each_case("gamma_mod", having="out/top_k")
def test_what_training_lets_run_and_its_loss(case):
    count = case["param/image_and_instruction"]
    assert count + case["param/question_tokens"] == len(case["in/hidden"])
    tokens, method = tokens_of(case, count), GammaMoD(loss_weight=1.0)
    budget = method.placements(32)[0].budget.resolve(count)
    assert budget + case["param/question_tokens"] == case["out/top_k"]
    plan = method.plan(tokens, budget)
    question = torch.arange(count, len(case["in/hidden"]))
    kept = torch.cat([plan.keep[0], question])
    assert kept.tolist() == case["out/kept_sorted"].tolist()
    whole = method.plan(tokens_of(case, len(case["in/hidden"])), budget)
    close(whole.gate[0].detach(), case["out/prob"])
    assert torch.equal(whole.gate[0, :count], plan.gate[0])
    close(left(case, kept, whole.gate[0].detach()), case["out/hidden_out"])
    logits = tokens.module(case["in/hidden"])[question].detach()
    protected = nn.functional.cross_entropy(logits, torch.ones_like(question), reduction="sum")
    total = plan.losses["gamma_mod"].detach() * count + protected
    close(total[0] / len(case["in/hidden"]), torch.tensor(case["out/aux_loss"]))
