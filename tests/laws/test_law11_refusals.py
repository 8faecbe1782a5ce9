"""Law 11: what does not fit fails at once, by name, with what would work; never in silence."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import (
    FAMILIES,
    GISTS,
    METHODS,
    fits,
    inputs_of,
    logits_of,
    model_of,
    settings,
)
from tests.tiny import QWEN, VIDEO, Image, Sample, Text, build, gist_tokens, make_inputs
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticSlidingWindowLayer,
)

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import (
    CompressionStateError,
    ConfigError,
    UnsupportedMethodError,
    UnsupportedModelError,
    VispressError,
)
from vispress.methods import DivPrune, FastV, PyramidDrop
from vispress.methods.base import Compressor
from vispress.registry import get_method
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.types import CLS_SIGNALS, Placement, Stage, TokenPlan, VisualTokens

WITHOUT_CLS = ("llava_onevision", *QWEN)
CLS_METHODS = [name for name in METHODS if get_method(name).reads & CLS_SIGNALS]


def home(method: str) -> Any:
    """A model that the method fits."""
    return model_of(next(family for family in FAMILIES if fits(family, method)))


def refused(error: type[VispressError], match: str, **options: Any) -> Any:
    """`compress_model` on LLaVA raises, and the model stays free."""
    model = options.pop("model", None) or model_of("llava")
    with pytest.raises(error, match=match), compressed(model, **options):
        pass
    with pytest.raises(CompressionStateError, match="not compressed"):
        compression_report(model)


# --- the method and the model


def test_families_without_cls_are_the_ones_meant() -> None:
    assert tuple(f for f in FAMILIES if not find_adapter(model_of(f)).has_cls) == WITHOUT_CLS
    assert set(CLS_METHODS) == {
        "fastervlm",
        "flashvlm",
        "globalcom2",
        "hired",
        "holov",
        "prumerge",
        "scope",
        "visiontrim",
        "visionzip",
        "vispruner",
        "vmtc",
        "vscan",
        "vtc_cls",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_of_input_are_the_ones_meant(family: str) -> None:
    adapter = find_adapter(model_of(family))
    assert ("video" in adapter.kinds) == ("video" in adapter.placeholders()) == (family in VIDEO)
    assert ("anyres" in adapter.kinds) == (family in ("llava_next", "llava_onevision"))


@pytest.mark.parametrize(
    ("family", "method"),
    [(f, m) for f in FAMILIES for m in METHODS if get_method(m).needs and not fits(f, m)],
)
def test_a_method_for_other_input_is_refused_with_its_reason(family: str, method: str) -> None:
    reason = {"anyres": "cuts no images into AnyRes crops", "video": "reads no videos"}
    refused(
        UnsupportedMethodError,
        f"{method} is made for {get_method(method).needs} input, but {family} "
        f"{reason[get_method(method).needs or '']}. Methods that work on this model: .*divprune",
        model=model_of(family),
        method=method,
        keep_ratio=0.5,
    )


@pytest.mark.some(cases=12)
@pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in WITHOUT_CLS for m in CLS_METHODS if fits(f, m)]
)
def test_a_cls_method_on_a_model_without_cls_names_the_substitute_and_what_works(
    family: str, method: str
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with pytest.raises(UnsupportedMethodError) as caught:
        compress_model(model, method, keep_ratio=0.4)
    message = str(caught.value)
    assert message.startswith(f"{method} needs cls_")
    assert f", which {family} cannot give" in message
    assert "scores='column_mean'" in message
    working = message.split("Methods that work on this model: ")[1].split(", ")
    assert set(working) == {m for m in METHODS if fits(family, m)} - set(CLS_METHODS)
    with compressed(model, method, keep_ratio=0.4, scores="column_mean") as report:
        logits_of(model, inputs)
        assert any("column mean" in note for note in report.notes)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_method_named_as_working_works(family: str) -> None:
    model = model_of(family)
    adapter = find_adapter(model)
    for name in METHODS:
        if get_method(name).reads <= adapter.signals() and fits(family, name):
            with gist_tokens(2 if name in GISTS else 0):
                inputs = inputs_of(family)
            with compressed(model, name, **settings(family, name)) as report:
                logits_of(model, inputs)
                assert len(report.samples) == 3


def test_an_unknown_model_is_refused_with_the_list_of_families() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        compress_model(nn.Linear(2, 2), "fastv", keep_ratio=0.4)
    assert str(caught.value).startswith("no adapter for Linear")
    assert all(family in str(caught.value) for family in FAMILIES)
    assert "register_adapter" in str(caught.value)


def test_a_text_only_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        compress_model(LlamaForCausalLM(config), "fastv", keep_ratio=0.4)


def test_something_that_is_no_module_is_refused_with_a_hint() -> None:
    class Pipeline:
        model = nn.Linear(1, 1)

    with pytest.raises(UnsupportedModelError, match=r"got Pipeline \(pass its \.model\)"):
        compress_model(Pipeline(), "fastv", keep_ratio=0.4)  # type: ignore[type-var]


@pytest.mark.parametrize("method", ["fastv", "divprune", "visionzip"])
@pytest.mark.parametrize("family", QWEN)
def test_compact_positions_on_three_axes_are_refused(family: str, method: str) -> None:
    model = model_of(family)
    with pytest.raises(
        UnsupportedMethodError, match=rf"{family}.*three axes.*positions='original'"
    ):
        compress_model(model, method, positions="compact", **settings(family, method))


@pytest.mark.parametrize("attn", ["flex_attention", "paged|eager"])
def test_attention_whose_masks_cannot_be_cut_is_refused_with_what_works(attn: str) -> None:
    model = build("llava", layers=2)
    model.model.language_model.config._attn_implementation_internal = attn
    with pytest.raises(UnsupportedModelError) as caught:
        compress_model(model, "fastv", keep_ratio=0.4, layer=1)
    assert all(name in str(caught.value) for name in (attn, "sdpa", "flash_attention_2", "eager"))


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_and_comes_back(name: str) -> None:
    model = build("llava", layers=2)
    before = getattr(model, name)
    refusal = pytest.raises(UnsupportedModelError, match=rf"{name}: continuous batching.*generate")
    with compressed(model, "fastv", keep_ratio=0.4, layer=1), refusal:
        getattr(model, name)(inputs=[[1, 2, 3]])
    assert getattr(model, name) == before


def test_attention_changed_after_compression_is_refused_at_the_call() -> None:
    model, inputs = build("llava", layers=2), inputs_of("llava")
    compress_model(model, "fastv", keep_ratio=0.4, layer=1)
    model.model.language_model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        model(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_to_eager_after_compression_is_followed(family: str) -> None:
    model = build(family, dtype=torch.float32)
    inputs = inputs_of(family, dtype=torch.float32)
    with compressed(model, "fastv", keep_ratio=0.4):
        expected = logits_of(model, inputs)
        model.set_attn_implementation("eager")
        real = inputs["attention_mask"].bool()
        assert (logits_of(model, inputs) - expected)[real].abs().max() < 1e-3


# --- layers


@pytest.mark.parametrize("layer", [0, 6, 99, -1, 2.0, True, "2"])
def test_a_layer_out_of_range_is_refused_with_the_range(layer: Any) -> None:
    refused(ConfigError, "layer must be an integer", method="fastv", keep_ratio=0.4, layer=layer)


@pytest.mark.parametrize("method", ["pyramiddrop", "transprune"])
def test_layers_of_a_schedule_out_of_range_are_refused(method: str) -> None:
    refused(ConfigError, r"\[1, 6\), got 6", method=method, layers=(2, 4, 6))
    refused(ConfigError, "strictly ascending", method=method, layers=(4, 2, 5))
    refused(ConfigError, "equally long", method=method, layers=(2, 4), ratios=(0.5, 0.3, 0.1))


def test_a_model_with_too_few_layers_for_a_schedule_is_refused() -> None:
    model = build("llava", layers=3)
    refused(ConfigError, "at least 4 decoder layers, got 3", model=model, method="pyramiddrop")


@pytest.mark.parametrize(
    "chain",
    [
        [FastV(keep_ratio=0.5, layer=3), FastV(keep_ratio=0.5, layer=2)],
        [FastV(keep_ratio=0.5, layer=3), DivPrune(keep_ratio=0.5)],
        [PyramidDrop(), FastV(keep_ratio=0.5, layer=2)],
    ],
)
def test_a_chain_against_the_order_of_layers_is_refused(chain: list[Compressor]) -> None:
    refused(ConfigError, "order the chain by layer", method=chain)


@dataclass(frozen=True, kw_only=True)
class Placed(Compressor):
    """Acts wherever the test says."""

    name: ClassVar[str] = "placed"
    summary: ClassVar[str] = "wherever"
    paper: ClassVar[str] = "control"

    stage: Stage = Stage.PRE_LLM
    layer: int = 0
    times: int = 1

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        one = Placement(stage=self.stage, budget=self.budget(num_layers), layer=self.layer)
        return (one,) * self.times

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        raise AssertionError("never asked")


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ConfigError, "no placement", {"times": 0}),
        (ConfigError, r"\[0, 1\)", {"layer": 2}),
        (ConfigError, r"\[1, 6\)", {"stage": Stage.IN_LLM}),
        (ConfigError, r"\[1, 6\)", {"stage": Stage.IN_LLM, "layer": 6}),
        (UnsupportedMethodError, "inside the encoder", {"stage": Stage.ENCODER}),
    ],
)
def test_a_third_party_placement_that_cannot_be_is_refused(
    error: Any, match: str, options: dict[str, Any]
) -> None:
    refused(error, match, method=Placed(keep_ratio=0.4, **options))


# --- at the call: caches, chunks, states


class Quantised(QuantizedLayer):
    """A quantised layer that needs no backend (it is refused before it stores anything)."""

    def _quantize(self, tensor: Any, axis: int) -> Any:
        return tensor

    def _dequantize(self, q_tensor: Any) -> Any:
        return q_tensor


def _sliding_static(config: Any) -> Cache:
    return Cache(layers=[StaticSlidingWindowLayer(200, sliding_window=8) for _ in range(6)])


CACHES = {
    "Quantised": lambda config: Cache(layers=[Quantised() for _ in range(6)]),
    "DynamicSlidingWindowLayer": lambda config: Cache(
        layers=[DynamicSlidingWindowLayer(sliding_window=8) for _ in range(6)]
    ),
    "StaticSlidingWindowLayer": _sliding_static,
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "offloaded static": lambda config: StaticCache(
        config=config, max_cache_len=200, offloading=True
    ),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_that_cannot_be_short_is_refused_by_name_with_what_works(
    family: str, kind: str
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, "fastv", keep_ratio=0.4):
        cache = CACHES[kind](model.config.get_text_config())
        with pytest.raises(UnsupportedModelError) as caught:
            model(**inputs, **{CACHE: cache})
        assert kind.split()[0] in str(caught.value)
        assert "DynamicCache()" in str(caught.value)
        assert logits_of(model, inputs).isfinite().all()


def test_a_mixed_cache_is_refused_for_its_one_bad_layer() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    layers = [DynamicLayer() for _ in range(5)] + [DynamicSlidingWindowLayer(sliding_window=8)]
    refusal = pytest.raises(UnsupportedModelError, match="DynamicSlidingWindowLayer")
    with compressed(model, "fastv", keep_ratio=0.4), refusal:
        model(**inputs, **{CACHE: Cache(layers=layers)})


def test_a_cache_that_is_no_transformers_cache_is_refused() -> None:
    class Foreign:
        def get_seq_length(self, layer: int = 0) -> int:
            return 0

    model, inputs = model_of("llava"), inputs_of("llava")
    refusal = pytest.raises(UnsupportedModelError, match="Foreign is not supported")
    with compressed(model, "fastv", keep_ratio=0.4), refusal:
        model(**inputs, **{CACHE: Foreign()})


@pytest.mark.parametrize("method", ["fastv", "divprune"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in QWEN])
def test_chunked_prefill_compresses_or_is_refused_by_name(family: str, method: str) -> None:
    """Older transformers lose the image by themselves in it: then there is nothing to compress.
    What newer ones are given is in `test_chunked_prefill.py`.
    """
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(3), Image(4, 4), Text(3)])])
    blind = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}

    def chunked(given: dict[str, Any]) -> torch.Tensor:
        out = model.generate(
            **given,
            max_new_tokens=2,
            do_sample=False,
            prefill_chunk_size=5,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)

    loses_the_image = torch.equal(chunked(inputs), chunked(blind))
    with compressed(model, method, **settings(family, method)):
        if loses_the_image:
            assert torch.equal(chunked(inputs), chunked(blind))
        elif method == "divprune":
            chunked(inputs)
            image = compression_report(model).samples[0].images[0]
            assert image.num_kept < image.num_visual
        else:
            with pytest.raises(VispressError, match="prefill_chunk_size"):
                chunked(inputs)


@pytest.mark.parametrize("family", QWEN)
def test_chunked_prefill_never_compresses_silently_on_qwen(family: str) -> None:
    """Some transformers versions fail there by themselves, with an error of their own."""
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(3), Image(4, 4), Text(3)])])
    refusal = pytest.raises((VispressError, ValueError, RuntimeError, IndexError, TypeError))
    with compressed(model, "fastv", keep_ratio=0.4), refusal:
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_cache_in_an_uncompressed_model_is_refused(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    cache = DynamicCache()
    with compressed(model, "fastv", keep_ratio=0.4):
        first = model.generate(
            **inputs, **{CACHE: cache}, max_new_tokens=2, min_new_tokens=2, do_sample=False
        )
    more = torch.cat([inputs["attention_mask"], torch.ones_like(first[:, -2:])], dim=1)
    with pytest.raises(CompressionStateError, match="compression was removed"):
        model.generate(input_ids=first, attention_mask=more, **{CACHE: cache}, max_new_tokens=1)


def test_a_static_cache_that_holds_tokens_is_refused() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(3), Image(4, 4), Text(3)])])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    text = torch.full((1, 4), 9)
    model(input_ids=text, **{CACHE: cache})
    mask = torch.ones(1, 4 + inputs["input_ids"].shape[1], dtype=torch.long)
    refusal = pytest.raises(CompressionStateError, match="DynamicCache")
    with compressed(model, "fastv", keep_ratio=0.4), refusal:
        model(**(inputs | {"attention_mask": mask}), **{CACHE: cache})


def test_a_report_before_a_prefill_says_so() -> None:
    with compressed(model_of("llava"), "fastv", keep_ratio=0.4) as report:
        with pytest.raises(CompressionStateError, match="no report yet"):
            compression_report(model_of("llava"))
        with pytest.raises(CompressionStateError, match="no report yet"):
            _ = report.samples
    with pytest.raises(CompressionStateError, match=r"no report yet: .*the block has ended"):
        _ = report.samples


def test_a_report_asked_for_a_layer_that_is_none_says_which_there_are() -> None:
    model = model_of("llava")
    with compressed(model, "fastv", keep_ratio=0.4) as report:
        logits_of(model, inputs_of("llava"))
        for layer in (-1, 6):
            with pytest.raises(IndexError, match=r"\[0, 6\)"):
                report.alive(layer)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_a_decoder_exchanged_after_compression_is_noticed(method: str) -> None:
    """The hooks went with the old decoder: better an error than an uncompressed answer."""
    model, other = build("llava"), build("llava", seed=1)
    compress_model(model, method, keep_ratio=0.4)
    model.model.language_model = other.model.language_model
    with pytest.raises(CompressionStateError, match="remove_compression"):
        model(**inputs_of("llava"))


def test_layers_exchanged_after_compression_are_noticed() -> None:
    model, other = build("llava"), build("llava", seed=1)
    compress_model(model, "divprune", keep_ratio=0.4)
    model.model.language_model.layers = other.model.language_model.layers
    with pytest.raises(CompressionStateError, match="remove_compression"):
        model(**inputs_of("llava"))


def test_removal_works_after_a_decoder_was_exchanged() -> None:
    model, other = build("llava"), build("llava", seed=1)
    expected = logits_of(other, inputs_of("llava"))
    compress_model(model, "fastv", keep_ratio=0.4)
    model.model.language_model = other.model.language_model
    model.lm_head = other.lm_head
    model.model.vision_tower = other.model.vision_tower
    model.model.multi_modal_projector = other.model.multi_modal_projector
    remove_compression(model)
    assert torch.equal(logits_of(model, inputs_of("llava")), expected)
