"""VTW against its official code: what is left of a prompt, its positions, and the search."""

from statistics import fmean
from types import SimpleNamespace

import torch
from tests.parity.vectors import close, each_case

from vispress.bench.search.objective import divergence
from vispress.bench.search.withdrawal import candidates, search_withdrawal
from vispress.methods import VTW
from vispress.runtime.tokens.live_tokens import all_live, narrow


@each_case("vtw", having="param/seq_len")
def test_what_is_left_and_where_it_stands(case):
    start, image, length = (case[f"param/{k}"] for k in ("image_start", "image_tokens", "seq_len"))
    layers, published = case["param/n_layers"], case["param/k"]
    (placement,) = VTW(layer=published).placements(layers)
    (keep,) = [placement.budget.resolve(image)]
    text = length - image
    counts = [length if layer < placement.layer else text + keep for layer in range(layers)]
    assert counts == case["out/length_per_layer"].tolist()
    if (published, layers) == (15, 32):
        assert VTW().placements(layers)[0].layer == published
    gone = torch.zeros(1, length, dtype=torch.bool)
    gone[:, start : start + image] = True
    whole = all_live(1, length, (length,), gone.device)
    compact = case["param/pe_type"] == "compact"
    rows, _ = narrow(whole, gone, (image,), compact=compact, valid=None)
    assert rows.index[0].tolist() == case["out/tokens_at_last_layer"].tolist()
    positions = rows.index - (rows.shift if compact else 0)
    assert positions[0].tolist() == case["out/position_ids_at_last_layer"].tolist()


@each_case("vtw", having="in/logits_full")
def test_the_first_layer_that_diverges_little_is_found(case):
    full = case["in/logits_full"].log_softmax(-1)[:, None]
    withdrawn = case["in/logits_withdrawn"].log_softmax(-1)
    mean = divergence(withdrawn, full).mean(dim=0)
    close(mean, case["out/kl_mean"], rtol=2e-3)
    layers = case["param/n_layers"]
    assert len(candidates(layers)) == len(mean)
    objective = SimpleNamespace(
        num_layers=layers,
        uncompressed=0.0,
        least=lambda tolerance: -tolerance,
        value=lambda method, _: -float(mean[method.layer - candidates(layers).start]),
        share_of_tokens=lambda method: fmean(layer < method.layer for layer in range(layers)),
        share_of_flops=lambda method: 1.0,
    )
    found = search_withdrawal(objective, tolerance=case["param/eta"])
    assert found.method.layer == case["out/k"]
