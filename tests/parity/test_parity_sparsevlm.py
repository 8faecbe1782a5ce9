"""SparseVLM (v1.0 and v1.5) and SparseVLM+ (v2.0) against their official code."""

from dataclasses import replace

import torch
from tests.methods.helpers import merged, only
from tests.parity.vectors import close, each_case

from vispress.methods import SparseVLM, SparseVLMPlus
from vispress.methods._parts.clustering.density_peaks import dpc_clusters, dpc_scores
from vispress.methods._parts.scoring.text_raters import relation, text_raters
from vispress.methods.sparsevlm import fold_dropped, recycled


def bucket(case):
    """The pruning layer's tokens as the runtime hands them over, all words as queries."""
    start, n, words = (case[f"param/{k}"] for k in ("visual_start", "visual_tokens", "text_tokens"))
    image, text = slice(start, start + n), slice(start + n, start + n + words)
    chosen = case["out/rater_index_in_text"]
    rows = torch.full((1, case["in/rater_attention"].shape[0], words, n), float("nan"))
    rows = rows.nan_to_num(1e3)  # rows of words that are no raters must not count
    rows[0, :, chosen] = case["in/rater_attention"][..., image]
    embeddings = case["in/embeddings"][None]
    return only(
        features=case["in/layer_output"][None, image],
        query_attention=rows,
        text_embeddings=embeddings[:, text],
        text_after=words,
        input_embeddings=embeddings[:, image],
    )


@each_case("sparsevlm", having="out/rater_scores")
def test_raters_are_the_official_ones(case):
    (chosen,) = text_raters(bucket(case))
    assert chosen.nonzero()[:, 0].tolist() == case["out/rater_index_in_text"].tolist()


@each_case("sparsevlm", having="out/rater_scores")
def test_keeps_and_recycles_what_the_official_code_does(case):
    if case["param/version"] == 2:
        return  # SparseVLM+, below
    tokens = bucket(case)
    score, rows, chosen = relation(tokens)
    close(score[0], case["out/relation_score"])
    official = case["out/kept_visual_rel"]
    if case["param/version"] == 0:
        scale, bias = case["param/rank_scale"], case["param/rank_bias"]
        method = SparseVLM(rank_scale=scale, rank_bias=bias)
        assert method.counts(rows, chosen, tokens.num_visual) == [len(official)]
    count, clusters = recycled(tokens.num_visual - len(official))
    assert (count, clusters) == (len(case["out/recycled_visual_rel"]), case["out/cluster_num"])
    noise = 1e-6 * case["in/density_noise"][None, :count]
    plan = fold_dropped(tokens.features, score, len(official), clusters, noise)
    values = merged(plan, tokens.features)[0]
    (keep,) = plan.keep
    assert len(keep) == case["out/visual_tokens_after"]
    slots = torch.searchsorted(keep, official)
    assert torch.equal(keep[slots], official)
    start = case["param/visual_start"]
    assert (official + start).tolist() == [
        p for p in case["out/kept_positions"].tolist() if start <= p < start + tokens.num_visual
    ]
    close(values[slots], tokens.features[0, official])
    others = torch.ones(len(keep), dtype=torch.bool).scatter(0, slots, False)
    # clusters stand at their centres, not in the order of the official list
    ours, theirs = values[others], case["out/merged_tokens"]
    nearest = torch.cdist(theirs, ours).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(ours)))
    close(ours[nearest], theirs)


def rotary_prior(case):
    """`[1, words, N]`: ones, rotated (half-split) to the places of words and image."""
    start, n, words = (case[f"param/{k}"] for k in ("visual_start", "visual_tokens", "text_tokens"))
    dim, base = case["param/head_dim"], case["param/rope_base"]
    angles = torch.arange(start + n + words)[:, None] * base ** -(torch.arange(0, dim, 2) / dim)
    cos, sin = angles.double().cos(), angles.double().sin()
    ones = torch.cat([cos - sin, sin + cos], dim=1)
    return (ones[start + n :] @ ones[start : start + n].T / dim**0.5)[None]


@each_case("sparsevlm", having="out/rater_scores")
def test_the_plus_scores_and_keeps_what_the_official_code_does(case):
    if case["param/version"] != 2:
        return
    tokens = replace(bucket(case), rotary_prior=rotary_prior(case))
    method = SparseVLMPlus(preset=case["param/retain"])
    (score,) = method.score(tokens)
    # the divisor comes near zero: the loose tolerance of the vectors
    close(score, case["out/relation_score"], rtol=2e-3)
    stage = (2, 6, 15).index(case["param/layer"])
    budget = method.placements(32)[stage].budget
    num_keep = min(budget.resolve(576), tokens.num_visual - 1)
    (keep,) = method.plan(tokens, num_keep).keep
    assert keep.tolist() == case["out/kept_visual_rel"].tolist()
    assert len(keep) == case["out/visual_tokens_after"]
    start = case["param/visual_start"]
    image = (p for p in case["out/kept_positions"].tolist() if p < start + tokens.num_visual)
    assert (keep + start).tolist() == [p for p in image if p >= start]
    assert case["out/position_ids_after"].tolist() == case["out/kept_positions"].tolist()


@each_case("sparsevlm", having="out/centres_order")
def test_clusters_are_the_official_ones(case):
    x, count = case["in/x"][None], case["param/cluster_num"]
    noise = 1e-6 * case["in/density_noise"][None, : x.shape[1]]
    density, distance = dpc_scores(x, count, noise)
    close(density[0], case["out/density"])
    centres, label = dpc_clusters(x, count, noise)
    if not case["flag/ties"]:
        close((density * distance)[0], case["out/score"])
        assert centres[0].tolist() == case["out/centres_order"].tolist()
        assert label[0].tolist() == case["out/assignment"].tolist()
        means = [x[0, label[0] == cluster].mean(dim=0) for cluster in range(count)]
        close(torch.stack(means), case["out/merged"])
    if count == 1:
        assert label.unique().tolist() == [0]
