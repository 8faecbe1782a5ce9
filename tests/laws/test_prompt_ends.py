"""The runtime is told where prompts end: by labels, by lengths, by `generate`."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.laws.cases import model_of, settings
from tests.tiny import FAMILIES, Image, Sample, Text, build, make_inputs
from torch import Tensor

import vispress
from vispress import compress_model, compressed, remove_compression
from vispress.errors import CompressionStateError, ConfigError
from vispress.runtime.forward.model_call import MODEL_CALLS, ModelCall
from vispress.runtime.kv_cache.hf_compat import CACHE

PROMPTS = (Sample([Text(5), Image(), Text(4)]), Sample([Text(2), Image(), Text(9)]))
LENGTHS = torch.tensor([6, 7])


def prompts(family: str = "llava") -> dict[str, Any]:
    return make_inputs(family, PROMPTS, padding="left")


def labels_of(inputs: dict[str, Any]) -> Tensor:
    """The last two tokens of each row are the answer."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return labels


@contextmanager
def seeing(model: Any) -> Iterator[list[ModelCall]]:
    """The base model's calls that reach its language model with images."""
    calls: list[ModelCall] = []
    base = model if not hasattr(model, "lm_head") else model.model

    def starts(*_: Any) -> None:
        if (running := MODEL_CALLS.get()) and running[-1].captures:
            calls.append(running[-1])

    handle = base.language_model.register_forward_pre_hook(starts)
    try:
        yield calls
    finally:
        handle.remove()


def equal(found: Tensor | None, expected: Tensor | list[int] | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return torch.equal(found, torch.as_tensor(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_reach_the_base_models_call(family: str) -> None:
    model, inputs = model_of(family), prompts(family)
    labels = labels_of(inputs)
    with torch.no_grad():
        plain = model(**inputs, labels=labels)
    with compressed(model, "fastv", keep_ratio=1.0), torch.no_grad():
        with seeing(model) as calls:
            loss = model(**inputs, labels=labels).loss
            model.forward(**inputs, labels=labels)
        assert [call.labels is labels for call in calls] == [True] * 2
        with seeing(model) as calls:
            model(**inputs, shift_labels=labels)
            model.model(**inputs)
        assert [call.labels for call in calls] == [None, None]
        assert [call.shift_labels is labels for call in calls] == [True, False]
    assert torch.equal(loss, plain.loss)
    assert all(name not in model.__dict__ for name in ("forward", "generate"))


def test_labels_may_come_by_place() -> None:
    model, inputs = model_of("llava"), prompts()
    given = inputs | {"labels": labels_of(inputs)}
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    by_place = [given.get(name) for name in names[: names.index("labels") + 1]]
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad(), seeing(model) as calls:
        model(*by_place)
    assert [call.labels is given["labels"] for call in calls] == [True]


@pytest.mark.parametrize("first", ["compress", "peft"])
def test_labels_and_lengths_pass_peft(first: str) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    inputs, config = (
        prompts(),
        LoraConfig(target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM),
    )
    inner: Any = build("llava")
    if first == "compress":
        compress_model(inner, "fastv", keep_ratio=0.5)
    model: Any = get_peft_model(inner, config)
    if first == "peft":
        compress_model(model, "fastv", keep_ratio=0.5)
    labels = labels_of(inputs)
    with torch.no_grad(), seeing(inner) as calls:
        model(**inputs, labels=labels, prompt_lengths=LENGTHS)
        model.base_model(**inputs, labels=labels)
        model.generate(**inputs, max_new_tokens=2)
    assert [call.labels is labels for call in calls] == [True, True, False]
    assert equal(calls[0].prompt_lengths, LENGTHS)
    assert equal(calls[2].prompt_lengths, inputs["attention_mask"].sum(1))
    remove_compression(model)


def test_lengths_by_keyword_and_by_context() -> None:
    model, inputs = model_of("llava"), prompts()
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        with seeing(model) as calls:
            model(**inputs)
            with vispress.prompt_lengths([3, 4]):
                model(**inputs)
                with vispress.prompt_lengths(LENGTHS):
                    model.model(**inputs)
                model(**inputs, prompt_lengths=[5, 6])
                model.model(**inputs, prompt_lengths=(8, 9))
                model.forward(**inputs)
            model(**inputs)
        found = [call.prompt_lengths for call in calls]
        expected = [None, [3, 4], LENGTHS, [5, 6], [8, 9], [3, 4], None]
        assert all(map(equal, found, expected))


def test_threads_have_lengths_of_their_own() -> None:
    model, inputs = model_of("llava"), prompts()
    seen: dict[int, Tensor | None] = {}
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        with vispress.prompt_lengths([number, number]):
            barrier.wait()
            with torch.no_grad(), seeing(model) as calls:
                model(**inputs)
                barrier.wait()
            own = [c for c in calls if equal(c.prompt_lengths, [number, number])]
            seen[number] = own[0].prompt_lengths

    with compressed(model, "fastv", keep_ratio=0.5):
        threads = [threading.Thread(target=work, args=(n,)) for n in (2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(seen) == [2, 3, 4]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 0], r"from 1 up.*\[5, 0\]"),
        ([5.0, 6.0], "float"),
        ([True, True], "bool"),
        ([[5, 6]], r"\(1, 2\)"),
        ([], r"\(0,\)"),
        (5, "one integer from 1 up for each sample"),
        (["a", "b"], "'a'"),
        ([5, 99], r"prompt_lengths\[1\] is 99, but sample 1 has"),
    ],
)
def test_bad_lengths_are_refused(lengths: Any, message: str) -> None:
    model, inputs = model_of("llava"), prompts()
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        with pytest.raises(ConfigError, match=message):
            model(**inputs, prompt_lengths=lengths)
        with pytest.raises(ConfigError, match=message):
            model.model(**inputs, prompt_lengths=lengths)

        def inside() -> None:
            with vispress.prompt_lengths(lengths):
                model(**inputs)

        with pytest.raises(ConfigError, match=message):
            inside()
    assert vispress.prompts.current_lengths() is None


def lengths_in(model: Any, **call: Any) -> list[Tensor | None]:
    """Lengths in each call with images of a `generate`."""
    with compressed(model, "fastv", keep_ratio=0.5), seeing(model) as calls:
        model.generate(max_new_tokens=3, min_new_tokens=3, do_sample=False, **call)
    return [call.prompt_lengths for call in calls]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_knows_its_prompts(family: str) -> None:
    model, inputs = model_of(family), prompts(family)
    real = inputs["attention_mask"].sum(1)
    assert all(equal(found, real) for found in lengths_in(model, **inputs))
    # each step brings the images again
    steps = lengths_in(model, **inputs, use_cache=False)
    assert len(steps) == 3
    assert all(equal(found, real) for found in steps)
    for repeats in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        found = lengths_in(model, **inputs, **repeats)
        assert equal(found[0], real.repeat_interleave(repeats["num_beams"]))


def test_generate_infers_padding_as_transformers_does() -> None:
    model, inputs = model_of("llava"), prompts()
    mask = inputs.pop("attention_mask")
    whole = [mask.shape[1]] * 2
    assert equal(lengths_in(model, **inputs)[0], mask.sum(1))  # the model's own padding token
    assert equal(lengths_in(model, **inputs, pad_token_id=1)[0], whole)
    assert equal(lengths_in(model, **inputs, pad_token_id=0, eos_token_id=[7, 0])[0], whole)
    assert equal(lengths_in(model, inputs=inputs.pop("input_ids"), **inputs)[0], mask.sum(1))


def test_generate_from_embeddings_and_with_lengths_given() -> None:
    model, inputs = model_of("llava"), prompts()
    real = inputs["attention_mask"].sum(1)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert equal(lengths_in(model, **inputs, inputs_embeds=embeds)[0], real)
    assert equal(lengths_in(model, **inputs, prompt_lengths=[4, 5])[0], [4, 5])
    with vispress.prompt_lengths([6, 3]):
        assert equal(lengths_in(model, **inputs, num_beams=2)[0], [6, 6, 3, 3])
    with pytest.raises(ConfigError, match="1 entries, but generate got 2 prompts"):
        lengths_in(model, **inputs, prompt_lengths=[4])


@pytest.mark.parametrize("draft", ["lookup", "assistant"])
def test_drafts_do_not_count(draft: str) -> None:
    model, inputs = model_of("llava"), make_inputs("llava", PROMPTS[:1])
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, :3]  # found again by the look-up
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if draft == "assistant":
        options = {"assistant_model": build("llava", seed=1)}
    found = lengths_in(model, **inputs, **options)
    assert equal(found[0], [inputs["input_ids"].shape[1]])


def test_a_second_turn_counts_what_is_cached() -> None:
    model = model_of("llava")
    one, two = prompts(), make_inputs("llava", PROMPTS, padding="left", seed=1)
    with compressed(model, "fastv", keep_ratio=0.5), seeing(model) as calls:
        first = model.generate(
            **one, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
        cached = first.past_key_values.get_seq_length()
        ids = torch.cat([first.sequences, two["input_ids"]], dim=1)
        pads = torch.ones_like(first.sequences)[:, one["input_ids"].shape[1] :]
        mask = torch.cat([one["attention_mask"], pads, two["attention_mask"]], dim=1)
        more = {"pixel_values": two["pixel_values"], CACHE: first.past_key_values}
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, **more)
    assert cached == one["input_ids"].shape[1] + 1
    assert [call.prompt_lengths is None for call in calls] == [False, False]
    assert equal(calls[1].prompt_lengths, mask.sum(1))


@pytest.mark.full  # tracing takes half a minute, whatever the depth
def test_a_compiled_training_step_sees_its_labels() -> None:
    model, inputs = model_of("llava"), prompts()
    labels = labels_of(inputs)
    torch._dynamo.reset()
    with compressed(model, "divprune", keep_ratio=0.5):
        expected = model(**inputs, labels=labels).loss
        step = torch.compile(model, backend="eager")
        with seeing(model) as calls:
            loss = step(**inputs, labels=labels).loss
    torch._dynamo.reset()
    assert calls
    assert all(call.labels is not None and torch.equal(call.labels, labels) for call in calls)
    assert torch.allclose(loss, expected)


def test_signatures_stay_right() -> None:
    model = model_of("llava")
    before = {name: inspect.signature(getattr(model, name)) for name in ("forward", "generate")}
    with compressed(model, "fastv", keep_ratio=0.5):
        for name, known in before.items():
            now = inspect.signature(getattr(model, name))
            names = [each for each in now.parameters if each != "prompt_lengths"]
            assert names == list(known.parameters)
            # so that a trainer which drops columns that no forward takes leaves it
            assert "prompt_lengths" in now.parameters
            assert now.replace(parameters=[now.parameters[n] for n in names]) == known
        inner = inspect.signature(model.model.forward).parameters
        assert [*inner][-2:] == ["prompt_lengths", "kwargs"]
    assert inspect.signature(model.forward) == before["forward"]


def test_what_wrapped_the_forward_since_is_left_alone() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = build("llava"), prompts()
    with torch.no_grad():
        plain = model(**inputs).logits
        compress_model(model, "fastv", keep_ratio=0.5)
        small = model(**inputs).logits
        for module in (model, model.model):
            add_hook_to_module(module, ModelHook())
        with seeing(model) as calls:
            assert torch.equal(model(**inputs, prompt_lengths=LENGTHS).logits[:0], small[:0])
        assert equal(calls[0].prompt_lengths, LENGTHS)
        remove_compression(model)
        assert torch.equal(model(**inputs).logits, plain)
        compress_model(model, "fastv", keep_ratio=0.5)
        assert torch.equal(model(**inputs).logits, small)
        remove_compression(model)
        for module in (model, model.model):
            remove_hook_from_module(module)
        assert torch.equal(model(**inputs).logits, plain)
        compress_model(model, "fastv", keep_ratio=0.5)
        assert torch.equal(model(**inputs).logits, small)


@pytest.mark.parametrize("inside", ["", "model", "model.language_model.layers.1"])
def test_a_forward_replaced_since_is_noticed(inside: str) -> None:
    model, inputs = build("llava"), prompts()
    compress_model(model, "fastv", keep_ratio=0.5)
    replaced: Any = model.get_submodule(inside)
    replaced.forward = type(replaced).forward.__get__(replaced)
    message = f"{type(replaced).__name__}.forward was replaced after compress_model"
    with torch.no_grad(), pytest.raises(CompressionStateError, match=message):
        model(**inputs)
    remove_compression(model)


def test_accelerates_hooks_on_layers_may_come_and_not_go() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = build("llava"), prompts()
    layers = model.model.language_model.layers
    with torch.no_grad():
        with compressed(model, "fastv", keep_ratio=0.5):
            small = model(**inputs).logits
            for layer in layers:
                add_hook_to_module(layer, ModelHook())
            assert torch.equal(model(**inputs).logits, small)
        compress_model(model, "fastv", keep_ratio=0.5)
        for layer in layers:  # puts back what was there before it: no patch of ours
            remove_hook_from_module(layer)
        message = r"LlamaDecoderLayer.forward was replaced.*remove_compression"
        with pytest.raises(CompressionStateError, match=message):
            model(**inputs)
        remove_compression(model)
        compress_model(model, "fastv", keep_ratio=0.5)
        assert torch.equal(model(**inputs).logits, small)


@pytest.mark.parametrize("inside", [False, True])
def test_replicas_of_data_parallel_are_refused(inside: bool) -> None:
    model, inputs = model_of("llava"), prompts()
    attached = model.model if inside else model
    with compressed(model, **{"method": "fastv", **settings("llava", "fastv")}):
        replica = attached._replicate_for_data_parallel()
        with pytest.raises(CompressionStateError, match=r"DataParallel.*DistributedDataParallel"):
            replica(**inputs)
        if not inside:  # as nn.parallel.replicate joins them
            replica._modules["model"] = model.model._replicate_for_data_parallel()
            with pytest.raises(CompressionStateError, match="DataParallel"):
                replica.model(**inputs)
