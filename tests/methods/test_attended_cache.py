"""The most attended cached tokens, by hand."""

import torch

from vispress.methods import AttendedCache
from vispress.methods.cache_evictor import CachedTokens


def tokens_with(attention: list[list[float]], kv_heads: int) -> CachedTokens:
    """One image, one query row, a row of attention for each query head."""
    rows = torch.tensor(attention)[None, :, None]
    cached = torch.zeros(1, kv_heads, rows.shape[-1], 2)
    index = torch.arange(rows.shape[-1])[None]
    return CachedTokens(
        layer=(0, 2),
        keys=cached,
        values=cached,
        attention=rows,
        index=index,
        num_original=index.shape[1],
    )


HEADS = [[0.1, 0.2, 0.3, 0.0], [0.1, 0.0, 0.3, 0.2], [0.4, 0.1, 0.0, 0.1], [0.0, 0.3, 0.1, 0.2]]


def test_each_kv_head_keeps_what_its_group_attends_to_and_the_earlier_of_equals() -> None:
    # groups sum to [.2 .2 .6 .2] and [.4 .4 .1 .3]
    plan = AttendedCache(num_tokens=2).plan_cache(tokens_with(HEADS, 2), 2)
    assert plan.keep.tolist() == [[[0, 2], [0, 1]]]
    assert plan.assign is None


def test_all_heads_keep_the_same_by_the_mean() -> None:
    # means are [.15 .15 .175 .125]
    plan = AttendedCache(num_tokens=2, per_head=False).plan_cache(tokens_with(HEADS, 2), 2)
    assert plan.keep.tolist() == [[[0, 2]]]
