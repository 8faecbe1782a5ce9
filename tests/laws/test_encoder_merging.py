"""Merging inside the vision encoder: what it computes, what it leaves alone, what it refuses."""

import copy
import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, QWEN, inputs_of, logits_of, model_of, run
from tests.laws.slow_tome import Line, Token, run_layer
from tests.laws.test_law01_prune_equals_mask import assert_equals_oracle
from tests.laws.test_law03_removal import assert_as_before, before
from tests.laws.test_law10_training import checkpointing, loss_of, training
from tests.tiny import VIDEO, Image, Sample, Text, Video, build, make_inputs
from torch import Tensor

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.adapters.base import find_adapter
from vispress.budget import allocate
from vispress.errors import CompressionStateError, ConfigError, UnsupportedMethodError
from vispress.methods import DivPrune, FasterVLM, FastV, ToMe
from vispress.runtime.encoder.capture import _pure_groups

EXACT = 1e-5


@contextmanager
def watched(adapter: Any) -> Any:
    """Notes the first layer's input, the rotary tables, and what the projector is given."""
    taps: list[Tensor] = []
    seen: dict[str, Any] = {"taps": taps, "tap": lambda _, args: taps.append(args[0])}
    block = adapter.encoder_blocks()[0]

    def first(_: Any, args: Any, kwargs: Any) -> None:
        seen["x"], seen["rotary"] = args[0].clone(), kwargs.get("position_embeddings")

    def last(_: Any, args: Any) -> None:
        seen["features"] = args[0]

    handles = [
        block.layer.register_forward_pre_hook(first, with_kwargs=True, prepend=True),
        adapter.projector.register_forward_pre_hook(last),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def shuffled(x: Tensor, side: int) -> list[list[int]]:
    """Patches of each token of a `side x side` tile whose 2 x 2 patches are joined."""
    grid = torch.arange(side * side).view(side, side)
    return [
        sorted(grid[r : r + 2, c : c + 2].flatten().tolist())
        for r in range(0, side, 2)
        for c in range(0, side, 2)
    ]


def lines_of(family: str, model: Any, inputs: Any, seen: Any) -> tuple[list[Line], list[Any]]:
    """The encoder's sequences before the first layer, and the rows that each token has."""
    x, rotary = seen["x"], seen["rotary"]
    lines, rows = [], []
    if family in QWEN:
        start, frame = 0, 0
        for t, h, w in inputs["image_grid_thw"].tolist():
            for _ in range(t):
                for size in windows(h // 2, w // 2) if family == "qwen2_5_vl" else [h * w // 4]:
                    own = [slice(start + 4 * i, start + 4 * i + 4) for i in range(size)]
                    tokens = [
                        Token(x[s], tuple(table[s] for table in rotary), [len(rows) + i])
                        for i, s in enumerate(own)
                    ]
                    lines.append(Line(None, tokens, frame))
                    rows += [(None, s) for s in own]
                    start += 4 * size
                frame += 1
        return lines, rows
    prefix = 1 if find_adapter(model).has_cls else 0
    n = x.shape[1] - prefix
    units = shuffled(x, round(n**0.5)) if family == "internvl" else [[i] for i in range(n)]
    for number, sequence in enumerate(x):
        tokens = [
            Token(sequence[[prefix + i for i in unit]], None, [len(rows) + i])
            for i, unit in enumerate(units)
        ]
        lines.append(Line(sequence[:1] if prefix else None, tokens, number))
        rows += [(number, [prefix + i for i in unit]) for unit in units]
    return lines, rows


def spread(lines: list[Line], rows: list[Any], like: Tensor) -> Tensor:
    """Every patch with the value of its token; [CLS] is left out."""
    out = torch.zeros_like(like)
    for token in (token for line in lines for token in line.tokens):
        for number, own in (rows[member] for member in token.members):
            if number is None:
                out[own] = token.rows
            else:
                out[number, own] = token.rows
    return out


def windows(h: int, w: int) -> list[int]:
    """Tokens of each window of 2 x 2, cut at the right and below."""
    return [min(2, h - r) * min(2, w - c) for r in range(0, h, 2) for c in range(0, w, 2)]


class Fixed(ToMe):  # type: ignore[misc]
    """Merges `num_tokens` tokens in every layer, as long as there are twice as many."""

    def merges_per_layer(self, num_tokens: int, num_keep: int, num_layers: int) -> tuple[int, ...]:
        counts = []
        for _ in range(num_layers):
            counts.append(min(self.num_tokens or 0, num_tokens // 2))
            num_tokens -= counts[-1]
        return tuple(counts)


def merges_of(method: ToMe, adapter: Any, inputs: Any, lines: list[Line]) -> list[tuple[int, ...]]:
    """Merges in each layer, a line: an image's budget is split over its lines by their size."""
    call = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    per_image = [len(s) for s in adapter.sequences("image", call, len(lines[0].tokens))]
    found, start, depth = [], 0, len(adapter.encoder_blocks())
    for count in per_image:
        sizes = [len(line.tokens) for line in lines[start : start + count]]
        shares = allocate(min(method.num_tokens or 0, sum(sizes)), sizes)
        for size, share in zip(sizes, shares, strict=True):
            found.append(method.merges_per_layer(size, max(1, share), depth))
        start += count
    return found


@pytest.mark.some(cases=14)
@pytest.mark.parametrize(
    "method",
    [Fixed(num_tokens=1), Fixed(num_tokens=3), ToMe(num_tokens=11)],
    ids=["one", "three", "budget"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_merging_written_out(family: str, method: ToMe) -> None:
    """As many in each sequence, and by a budget that sequences share unequally."""
    model, inputs = model_of(family), inputs_of(family)
    adapter = find_adapter(model)
    blocks = adapter.encoder_blocks()
    with torch.no_grad(), watched(adapter) as seen, compressed(model, method):
        tapped = [tap.register_forward_pre_hook(seen["tap"]) for tap in adapter.encoder_taps()]
        model(**inputs)
        for handle in tapped:  # behind the runtime's own hooks
            handle.remove()
    lines, rows = lines_of(family, model, inputs, seen)
    merges = merges_of(method, adapter, inputs, lines)
    visual = getattr(model.model, "visual", None)
    full = getattr(visual, "fullatt_block_indexes", ())
    taps = list(getattr(visual, "deepstack_visual_indexes", ()))
    assert len(seen["taps"]) == len(taps) == 2 * (family == "qwen3_vl")
    with torch.no_grad():
        for number, block in enumerate(blocks):
            alone = family == "qwen2_5_vl" and number not in full
            run_layer(family, block.layer, lines, [m[number] for m in merges], alone=alone)
            if number in taps:  # DeepStack reads on the way
                read = seen["taps"][taps.index(number)]
                assert (read - spread(lines, rows, seen["x"])).abs().max() < EXACT
    expected = spread(lines, rows, seen["x"])
    if adapter.has_cls:
        expected = expected[:, 1:]
    if family == "internvl":  # the pixel shuffle comes ahead of its projector
        side = round(expected.shape[1] ** 0.5)
        ratio = model.config.downsample_ratio
        expected = expected.unflatten(1, (side, side))
        expected = model.model.pixel_shuffle(expected, scale_factor=ratio).flatten(1, 2)
    assert sum(len(line.tokens) for line in lines) < len(rows)
    assert (seen["features"] - expected).abs().max() < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_behind_the_encoder_equals_the_masked_model(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    chain = [ToMe(keep_ratio=0.6), DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2)]
    result = run(model, inputs, chain, positions="original")
    for sample in result.report.samples:
        for image in sample.images:
            counts = [round(0.6 * image.num_visual)]
            counts += [round(0.6 * counts[0])]
            assert [p.num_kept for p in image.placements] == [*counts, round(0.5 * counts[1])]
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_tokens_all_reach_the_llm_as_copies(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    chain = [ToMe(keep_ratio=0.4, restore=True), FastV(keep_ratio=0.5, layer=2)]
    result = run(model, inputs, chain, positions="original")
    for sample in result.report.samples:
        for image in sample.images:
            assert image.placements[0].num_kept == image.num_visual
            assert image.encoder is not None
            assert image.encoder.num_left < image.encoder.num_tokens
    assert_equals_oracle(model, inputs, result)


def test_the_report_counts_the_encoder_apart_from_the_llm() -> None:
    model, inputs = model_of("llava_next"), inputs_of("llava_next")
    with compressed(model, "tome", keep_ratio=0.5) as report:
        logits_of(model, inputs)
        images = [image for sample in report.samples for image in sample.images]
        text = str(report)
    layers = len(find_adapter(model).encoder_blocks())
    for image in images:
        assert image.encoder is not None
        crops = image.encoder.num_tokens // 16
        per_layer = [16 * crops - (8 * crops * (i + 1)) // layers for i in range(layers)]
        assert image.encoder.num_left == 8 * crops == image.encoder.per_layer[-1]
        assert abs(image.encoder.per_layer[0] - per_layer[0]) <= crops
        assert image.num_kept == round(0.5 * image.num_visual)
        assert f"encoder {8 * crops} of {16 * crops}" in text
    with compressed(model, "divprune", keep_ratio=0.5) as report:
        logits_of(model, inputs)
        assert report.samples[0].images[0].encoder is None


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_a_model_that_never_ran_merges_as_one_that_did(family: str, attn: str) -> None:
    """transformers' hooks that keep hidden states come at the first forward, behind ours."""
    inputs = inputs_of(family, dtype=torch.float32)
    expected = run(model_of(family, torch.float32), inputs, ToMe(keep_ratio=0.4)).logits
    fresh = build(family, dtype=torch.float32, attn=attn)
    got = run(fresh, inputs, ToMe(keep_ratio=0.4)).logits
    assert (got - expected)[inputs["attention_mask"].bool()].abs().max() < 1e-3


def test_masks_of_windows_begin_where_cuda_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2_5_vl", torch.bfloat16)
    samples = [Sample([Text(2), Image(5, 5), Text(3)])]  # windows of 4, 2 and 1
    inputs = make_inputs("qwen2_5_vl", samples, dtype=torch.bfloat16)
    attend, places = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is not None and attn_mask.is_floating_point():
            places.append(attn_mask.data_ptr() % 16)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with compressed(model, Fixed(num_tokens=1)):
        model(**inputs)
    assert len(places) > 10
    assert not any(places)


@pytest.mark.parametrize("family", VIDEO)
def test_frames_of_videos_merge_each_by_itself(family: str) -> None:
    samples = [Sample([Text(4), Video(2, 4, 4), Text(3)]), Sample([Text(2), Video(2, 4, 4)])]
    model = model_of(family)
    inputs = make_inputs(family, samples, padding="left")
    result = run(model, inputs, ToMe(keep_ratio=0.4))
    for sample in result.report.samples:
        (video,) = sample.images
        assert video.num_kept == round(0.4 * video.num_visual)
        assert video.encoder is not None
        assert video.encoder.num_left < video.encoder.num_tokens
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_layers_that_merge_are_not_checkpointed_and_checkpointed_again_afterwards(
    family: str, reentrant: bool
) -> None:
    model, inputs = build(family), inputs_of(family)
    layers = [block.layer for block in find_adapter(model).encoder_blocks()]
    flags: list[bool] = []
    handle = layers[0].register_forward_pre_hook(
        lambda module, _: flags.append(module.gradient_checkpointing)
    )
    with training(model), checkpointing(model, reentrant=reentrant):
        assert all(layer.gradient_checkpointing for layer in layers)
        with compressed(model, ToMe(keep_ratio=0.4)):
            loss_of(model, inputs).backward()
            with pytest.raises((AttributeError, TypeError)):
                model.model.get_image_features(pixel_values="nothing to see")
        assert all(layer.gradient_checkpointing for layer in layers)
        loss_of(model, inputs).backward()
    handle.remove()
    # older transformers run hooks again with the layer in the backward pass
    assert flags[:2] == [False, True]
    assert all(flags[1:])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_an_exception_inside_the_encoder_leaves_nothing_behind(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    snapshot = before(family)
    block = find_adapter(model).encoder_blocks()[1]

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the encoder")

    with compressed(model, ToMe(keep_ratio=0.4)):
        good = logits_of(model, inputs)
        handle = block.mlp.register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            logits_of(model, inputs)
        handle.remove()
        assert torch.equal(logits_of(model, inputs), good)
    assert_as_before(family, snapshot)


# --- what is refused


def refused(error: type[Exception], match: str, model: Any, chain: Any) -> None:
    with pytest.raises(error, match=match):
        compress_model(model, chain)
    assert "_vispress_attachment" not in find_adapter(model).base.__dict__


def test_what_reads_the_encoder_behind_a_merge_is_refused() -> None:
    refused(
        UnsupportedMethodError,
        "fastervlm reads cls_attention of the vision encoder's own tokens, which tome merges",
        model_of("llava"),
        [ToMe(keep_ratio=0.5), FasterVLM(keep_ratio=0.5)],
    )


def test_merging_in_the_encoder_comes_first_in_a_chain() -> None:
    chain = [DivPrune(keep_ratio=0.5), ToMe(keep_ratio=0.5)]
    refused(ConfigError, "divprune before it .* order the chain", model_of("llava"), chain)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_that_cannot_weigh_tokens_is_refused(family: str) -> None:
    model = build(family, layers=2)
    config = find_adapter(model).encoder_blocks()[0].attention.config
    inputs = inputs_of(family)
    with compressed(model, ToMe(keep_ratio=0.5)):
        config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(UnsupportedMethodError, match="flash_attention_2"):
            logits_of(model, inputs)
    refused(
        UnsupportedMethodError,
        "'flash_attention_2' in the vision encoder cannot; these can: sdpa, eager",
        model,
        ToMe(keep_ratio=0.5),
    )


def test_an_encoder_built_another_way_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llava")
    monkeypatch.setattr(type(find_adapter(model)), "encoder_blocks", lambda self: ())
    refused(UnsupportedMethodError, "llava model's vision encoder", model, ToMe(keep_ratio=0.5))
    with pytest.raises(UnsupportedMethodError) as caught:
        compress_model(model, "evs", keep_ratio=0.5)
    assert "tome" not in str(caught.value).split("Methods that work on this model: ")[1]


def test_a_report_of_the_last_prefill_needs_one() -> None:
    model = build("llava", layers=2)
    compress_model(model, ToMe(keep_ratio=0.5))
    with pytest.raises(RuntimeError, match="no visual tokens"):
        compression_report(model)
    remove_compression(model)


# --- where models live


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_threads_that_share_a_model_do_not_meet(family: str) -> None:
    model = model_of(family)
    batches = [
        make_inputs(family, [Sample([Text(3 + i), Image(4, 4 + 2 * (i % 2)), Text(4)])], seed=i)
        for i in range(6)
    ]
    out: dict[int, Tensor] = {}
    with compressed(model, ToMe(keep_ratio=0.4)):
        alone = [logits_of(model, batch) for batch in batches]
        start = threading.Barrier(6)

        def work(i: int) -> None:
            start.wait()
            for _ in range(3):
                out[i] = logits_of(model, batches[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(out[i], alone[i]) for i in range(6))


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_a_deep_copy_and_offloaded_weights_merge_alike(family: str) -> None:
    from accelerate import cpu_offload

    inputs = inputs_of(family)
    expected = run(model_of(family), inputs, ToMe(keep_ratio=0.4)).logits
    model = build(family)
    compress_model(model, ToMe(keep_ratio=0.4))
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits_of(twin, inputs), expected)
    remove_compression(twin)
    assert not any(module._forward_pre_hooks for module in twin.modules())
    cpu_offload(twin, execution_device=torch.device("cpu"))
    with compressed(twin, ToMe(keep_ratio=0.4)):
        assert (logits_of(twin, inputs) - expected).abs().max() < 1e-12


@pytest.mark.slow
def test_a_compiled_encoder_merges_or_is_an_error() -> None:
    model, inputs = build("llava", dtype=torch.float32), inputs_of("llava", dtype=torch.float32)
    tower = model.model.vision_tower
    tower.forward = torch.compile(tower.forward, backend="eager")
    compress_model(model, ToMe(keep_ratio=0.5))
    problem = None
    try:
        model(**inputs)
    except CompressionStateError as error:  # one graph, which no hook sees
        problem = str(error)
    if problem is not None:
        assert "compiled" in problem
        return
    # transformers breaks the graph before the layers
    images = [image for s in compression_report(model).samples for image in s.images]
    assert all(i.encoder and i.encoder.num_left < i.encoder.num_tokens for i in images)


@pytest.mark.parametrize(
    ("name", "square", "group"),
    [
        (3.0, 9.0, 3),
        (3.0, 9.0005, 3),  # rounding
        (3.002, 9.014, -1),  # 0.998 of 3 and 0.002 of 4: a spread of 0.002
        (3.5, 12.5, -1),
        (0.0, 0.0, -1),  # no token of the encoder, such as a newline
    ],
)
def test_a_group_is_pure_only_without_spread(name: float, square: float, group: int) -> None:
    both = torch.tensor([[name, square]], dtype=torch.float64)
    assert _pure_groups(both).tolist() == [group]
