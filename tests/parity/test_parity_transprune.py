"""TransPrune against its official code, stage by stage."""

from dataclasses import replace

import torch
from tests.methods.helpers import only
from tests.parity.stages import attention_rows, drop, image_part, outputs, sequence_length
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import TransPrune
from vispress.methods.transprune import summed_variation
from vispress.types import Transition


def measure(layer, pairs, visual):
    """The transition of a layer from its modules' inputs and outputs `[L, D]`."""
    cosine = torch.stack([torch.cosine_similarity(x, y, dim=-1) for x, y in pairs])
    magnitude = torch.stack([y.norm(dim=-1) / x.norm(dim=-1) for x, y in pairs])
    return Transition(
        layer=layer,
        magnitude=magnitude[None][..., visual],
        cosine=cosine[None][..., visual],
        sequence_cosine=cosine[None],
        sequence_valid=torch.ones(1, cosine.shape[1], dtype=torch.bool),
    )


@each_case("transprune", having="out/weight")
def test_transition_weight_of_one_module(case):
    before, after = case["in/before"][0], case["in/after"][0]
    everything = torch.arange(len(before))
    # the second module gives nothing
    step = measure(0, [(before, after), (before, torch.zeros_like(after))], everything)
    close(summed_variation([step], "signed"), case["out/weight"])


@each_case("transprune", having="param/pruning_layers")
def test_every_stage_keeps_what_the_official_code_keeps(case):
    # "after layer n", counted from 1, is "before layer n", counted from 0
    layers = tuple(case["param/pruning_layers"].tolist())
    measured = tuple(layer - 1 for layer in case["param/accumulating_layers"].tolist())
    method = TransPrune(
        layers=layers, ratios=tuple(case["param/ratios"].tolist()), transition_layers=measured
    )
    modules = [case[f"in/{name}"] for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")]
    alive, steps = torch.arange(sequence_length(case)), {}
    for stage, placement in enumerate(method.placements(case["param/n_layers"])):
        out = outputs(case, stage)
        image = image_part(case, alive)
        assert (placement.layer, placement.attention_of) == (layers[stage], "next")
        assert alive[image].tolist() == out("scored_positions").tolist()
        assert len(placement.transitions) == out("n_accumulated_layers")
        for layer in placement.transitions:
            if layer not in steps:
                x1, y1, x2, y2 = (m[measured.index(layer)][alive] for m in modules)
                steps[layer] = measure(layer, [(x1, y1), (x2, y2)], image)
        rows = attention_rows(case["in/q_text"][stage], case["in/k"][stage], alive)[..., image]
        tokens = only(query_attention=rows[None], transition=tuple(steps.values()))
        score = method.score(tokens)[0]
        close(2 * score, out("score"))
        for part, alpha in (("ttv", 1.0), ("iga", 0.0)):
            close(replace(method, alpha=alpha).score(tokens)[0], out(f"{part}_normalised"))
        num_keep = placement.budget.resolve(case["param/image_tokens"])
        assert num_keep == out("keep_count")
        (keep,) = method.plan(tokens, num_keep).keep
        official = torch.searchsorted(alive[image], out("kept_positions"))
        same_kept(case, keep, official, score)
        alive = drop(alive, image, official)
        # survivors keep what was measured of them before
        steps = {
            layer: replace(
                step,
                magnitude=step.magnitude[..., official],
                cosine=step.cosine[..., official],
            )
            for layer, step in steps.items()
        }
    assert alive.tolist() == case["out/final_positions"].tolist()
