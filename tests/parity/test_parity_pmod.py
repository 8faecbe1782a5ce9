"""p-MoD against vectors of the official code: shares by layer, routed tokens, and what leaves."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from tests.parity.vectors import close, each_case
from torch import nn

from vispress.budget import Budget
from vispress.methods import PMoD
from vispress.methods.pmod import Routers
from vispress.runtime.stages.skip import LayerSkip, _Skips
from vispress.runtime.tokens.live_tokens import all_live, narrow, scale_rows
from vispress.types import VisualTokens, full_index

LAYER = 3


WITHOUT_DECAY = {"interleave": "interleaved", "deep_all": "deep"}


def method_of(case):
    """The method that a schedule's name asks for."""
    spec, beta = case["param/spec"], case["param/average_ratio"]
    if spec in WITHOUT_DECAY:
        return PMoD(beta=beta, decay=WITHOUT_DECAY[spec])
    kind, _, high, low = spec.split("_")
    decay = {"shiftedcos": "cosine", "shiftedlinear": "linear"}[kind]
    return PMoD(beta=beta, decay=decay, high=float(high), low=float(low))


@each_case("pmod", having="param/spec")
def test_shares_of_layers(case):
    """The official curves are those of 32 layers, whatever the depth."""
    method, layers = method_of(case), case["param/n_layers"]
    layers = layers if case["param/spec"] in WITHOUT_DECAY else 32
    routed = [layer for layer in case["out/mod_layers"].tolist() if layer < layers]
    assert [p.layer for p in method.placements(layers)] == routed
    official = case["out/ratio_per_layer_f64"][:layers].nan_to_num(1.0)  # NaN: dense
    close(torch.tensor(method.shares(layers)).double(), official)
    if case["param/spec"] not in WITHOUT_DECAY:
        curve = case["out/undecorated_curve_f64"][:layers].clamp(method.low, 1.0)
        close(torch.tensor(replace(method, high=1.0).shares(layers)).double(), curve)


def routed(case, sample):
    """The method's plan for the visual tokens of a sample, and their places."""
    places = case["in/target_mask"][sample].nonzero()[:, 0]
    features = case["in/hidden"][sample, places][None]
    routers = Routers(features.shape[-1], (LAYER,))
    router = routers.get_submodule(str(LAYER))
    router.load_state_dict({"weight": case["in/router_w"], "bias": case["in/router_b"]})
    tokens = VisualTokens(
        features=features,
        index=full_index(1, len(places), features.device),
        num_original=len(places),
        module=routers,
        depth=(LAYER, 32),
    )
    budget = Budget(keep_ratio=case["param/ratio"], rounding=PMoD.rounding)
    count = budget.resolve(len(places))
    assert count == case["out/top_k"][sample]
    method = PMoD(
        norm=case["param/norm_type"],
        scale=case["param/norm_scale"],
        shift=case["param/norm_bias"],
    )
    return places, method.plan(tokens, count)


class Stub(nn.Module):
    """The layer of the vectors: two matrices in place of attention and MLP."""

    def __init__(self, case):
        super().__init__()
        self.residual, self.mlp = case["in/residual_matrix"], case["in/mlp_matrix"]

    def forward(self, hidden, span):
        return hidden @ self.residual.mT + scale_rows(hidden @ self.mlp.mT, span.gate, span.rows)


@each_case("pmod", having="in/hidden")
def test_what_is_chosen_and_what_leaves(case):
    hidden, real = case["in/hidden"], case["in/attention_mask_2d"].bool()
    batch, length, _ = hidden.shape
    gate, drop = torch.ones(batch, length), torch.zeros(batch, length, dtype=torch.bool)
    for sample in range(batch):
        places, plan = routed(case, sample)
        gate[sample, places] = plan.gate[0].detach()
        drop[sample, places] = True
        drop[sample, places[plan.keep[0]]] = False
        close(gate[sample, places], case["out/router_weight"][sample, places])
    if case["flag/ties"]:  # saturated weights tie with those of text there, logits do not here
        return
    assert torch.equal(case["in/target_mask"].bool() & ~drop, case["out/kept_target_mask"].bool())
    counts, none = tuple(real.sum(1).tolist()), torch.zeros_like(drop)
    whole = all_live(batch, length, counts, hidden.device)
    base, local = narrow(whole, none, (0,) * batch, compact=False, valid=real)
    gone = tuple(drop.sum(1).tolist())
    some, inner = narrow(base, drop, gone, compact=False, valid=base.valid)
    assert torch.equal(some.alive, case["out/kept_mask"].bool())
    assert some.counts == tuple(case["out/kept_lengths"].tolist())
    for row, valid, official in zip(
        some.index, alive_rows(some), case["out/kept_position_ids"], strict=True
    ):
        assert row[valid].tolist() == official[: int(valid.sum())].tolist()
    span = LayerSkip(LAYER, LAYER + 1, some, gate, base, inner, gates_bypassed=True)
    state = SimpleNamespace(span_at=lambda _: span, plan=SimpleNamespace(backend="torch"))
    skips = _Skips(state)
    entering = hidden.gather(1, local[..., None].expand(-1, -1, hidden.shape[-1]))
    left = skips.leave(LAYER, Stub(case)(skips.enter(LAYER, entering), span))
    index = base.index[..., None].expand_as(left)
    official = case["out/hidden_out"].gather(1, index)
    close(left[alive_rows(base)], official[alive_rows(base)])


def alive_rows(rows):
    """`[B, P]` bool: rows that are no padding."""
    return torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid
