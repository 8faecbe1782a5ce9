"""PyramidDrop in training: the rows that rank, and what they keep, against its official code."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import each_case, same_kept

from vispress.methods import PyramidDrop
from vispress.runtime.layout import Document, PromptEnds


@each_case("pyramiddrop_training")
def test_rows_before_every_answer_rank(case):
    valid, labels = case["in/attention_mask"].bool(), case["in/labels"]
    B, n = labels.shape
    ends = PromptEnds(labels != -100)
    method = PyramidDrop(layers=(1,), ratios=(case["param/ratio"],))
    (placement,) = method.placements(4)
    for row in range(B):
        rows, official = (
            ends.of(row, Document(row, 0, n), valid),
            case[f"out/sample{row}_query_rows"],
        )
        real = torch.where(valid[row])[0]
        start, count = (int(case[f"param/image_{x}"][row]) for x in ("start", "tokens"))
        assert list(rows) == official.tolist() or start < 0  # without an image none is asked for
        official = case[f"out/sample{row}_kept_positions"]
        if not rows or start < 0:  # nothing asks, or nothing is there: the sample is left whole
            assert official.tolist() == real.tolist()
        else:
            queries = case["in/q"][row][:, list(rows)]
            logits = queries @ case["in/k"][row].mT / queries.shape[-1] ** 0.5
            future = torch.arange(n) > torch.tensor(rows)[:, None]
            attention = logits.masked_fill(future | ~valid[row], float("-inf")).softmax(-1)
            tokens = only(query_attention=attention[None, ..., start : start + count])
            num_keep = placement.budget.resolve(count)
            (keep,) = method.plan(tokens, num_keep).keep
            visual = official[(official >= start) & (official < start + count)] - start
            same_kept(case, keep, visual, method.score(tokens)[0])
            text = real[(real < start) | (real >= start + count)]
            assert torch.cat([text, keep + start]).sort().values.tolist() == official.tolist()
        left = case["out/attention_mask_after"][row].bool()
        assert case["out/labels_after"][row][left].tolist() == labels[row][official].tolist()
        assert case["out/position_ids_after"][row][left].tolist() == list(range(len(official)))
