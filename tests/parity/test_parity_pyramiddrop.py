"""PyramidDrop against its official code, stage by stage."""

import torch
from tests.methods.helpers import only
from tests.parity.stages import attention_rows, drop, image_part, outputs, sequence_length
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import PyramidDrop


@each_case("pyramiddrop")
def test_every_stage_keeps_what_the_official_code_keeps(case):
    layers = tuple(case["param/layer_list"].tolist())
    method = PyramidDrop(layers=layers, ratios=tuple(case["param/ratios"].tolist()))
    placements = method.placements(case["param/n_layers"])
    assert tuple(p.layer for p in placements) == layers
    alive = torch.arange(sequence_length(case))
    for stage, placement in enumerate(placements):
        out = outputs(case, stage)
        assert placement.attention_of == "next"
        image = image_part(case, alive)
        assert alive[image].tolist() == out("scored_positions").tolist()
        last = case["in/q_last_instruction"][stage][:, None]
        rows = attention_rows(last, case["in/k"][stage], alive)[..., image]
        tokens = only(query_attention=rows[None])
        score = method.score(tokens)[0]
        close(score, out("score"))
        num_keep = placement.budget.resolve(case["param/image_tokens"])
        assert num_keep == out("keep_count")
        (keep,) = method.plan(tokens, num_keep).keep
        official = torch.searchsorted(alive[image], out("kept_positions"))
        same_kept(case, keep, official, score)
        alive = drop(alive, image, official)
    assert alive.tolist() == case["out/final_positions"].tolist()
    assert PyramidDrop.default_positions == "compact"
    assert case["out/final_position_ids"].tolist() == list(range(len(alive)))
