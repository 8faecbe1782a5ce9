"""CDPruner's variant of OpenVINO GenAI against that code, compiled and run."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import CDPruner
from vispress.methods._parts.scoring.question import mean_cosine
from vispress.methods.cdpruner import blended, blended_select


@each_case("openvino_cdpruner", having="param/pruning_ratio")
def test_keeps_what_the_official_code_keeps(case):
    x, text = case["in/features"], case["in/text"][None]  # [frames, N, D], [1, M, D]
    frames, N, _ = x.shape
    weight, keep = case["param/relevance_weight"], case["out/keep_per_frame"]
    # half away from zero, there
    assert keep == int(N * (1 - case["param/pruning_ratio"] / 100) + 0.5 + 1e-9)
    similarity = mean_cosine(x, text.expand(frames, -1, -1))
    if "out/relevance_frame0_unsplit" in case:
        vectors = blended(x[:1], similarity[:1], weight)[0]
        D = x.shape[2]
        close(vectors.square().sum(dim=1), case["out/kernel_diagonal_frame0_unsplit"])
        close(vectors @ vectors[0], case["out/kernel_row0_frame0_unsplit"])
        relevant = vectors[:, D:].norm(dim=1)
        close(relevant, weight**0.5 * case["out/relevance_frame0_unsplit"])
    if case["param/split_threshold"]:
        tokens = only(features=x.flatten(0, 1)[None], text_embeddings=text, grid=(frames, 1, N))
        method = CDPruner(variant="openvino", relevance_weight=weight)
        ours = method.plan(tokens, frames * keep).keep[0]
    else:
        own = blended_select(x, similarity, weight, keep).sort(dim=1).values
        ours = (own + N * torch.arange(frames)[:, None]).flatten()
    if case["flag/ties"]:
        assert len(ours.unique()) == len(case["out/keep_sorted"])
    else:
        assert ours.tolist() == case["out/keep_sorted"].tolist()
