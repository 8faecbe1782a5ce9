"""Gated layers (p-MoD, gamma-MoD) compute what the plain model does by the formula.

Their routers are as if trained. Laws 1 to 16 meet p-MoD with routers of zeros, whose gates are 1,
and the gates of gamma-MoD as its plans give them.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, greedy, inputs_of, logits_of, model_of
from tests.laws.gated import Gates, gated_logits, gated_steps
from tests.laws.test_law10_training import (
    Gradients,
    assert_equal,
    backward,
    checkpointing,
    gradients,
    labels_of,
    loss_of,
    training,
)
from tests.tiny import NEWER, build
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vispress import compress_model, compressed
from vispress.adapters.base import find_adapter
from vispress.adapters.decoder import mlp_branch
from vispress.errors import CompressionStateError, ConfigError
from vispress.methods import DivPrune, FastV, GammaMoD, PMoD

METHOD = PMoD(beta=0.1, high=0.7, low=0.2)
SHARES = (0.6, 0.1 + 0.40450849718747367, 0.1 + 0.15450849718747373, 0.2, 0.2, 0.2)
"""Of six layers: half a cosine of pi l / 5, and `beta`, at least `low`."""
EXACT = 1e-5


def draw(model: Any, seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Give the routers random weights; returns them by layer."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if "vispress_modules" in name:
            _, layer, kind = name.rsplit(".", 2)
            with torch.no_grad():
                parameter.normal_(std=1.0, generator=generator)
            found.setdefault(int(layer), {})[kind] = parameter
    return {layer: (own["weight"], own["bias"]) for layer, own in found.items()}


def of_last(names: Iterable[str]) -> set[str]:
    """The router of the last layer: what it scales are visual tokens that nothing reads."""
    return {name for name in names if "vispress_modules.0.5." in name}


def gates_of(model: Any, weights: Any, shares: Any = SHARES) -> Gates:
    placeholders = tuple(find_adapter(model).placeholders().values())
    return Gates(shares, weights, METHOD.scale, placeholders)


SPARING = GammaMoD(capacity=0.4, layers=(1, 2, 4))
SPARED = (1.0, 0.6, 0.6, 1.0, 0.6, 1.0)


def shared_of(model: Any) -> Gates:
    """Gates by the one router of all layers, drawn at random."""
    ((_, weight),) = ((n, p) for n, p in model.named_parameters() if "vispress_modules" in n)
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    placeholders = tuple(find_adapter(model).placeholders().values())
    return Gates(SPARED, {}, 0.0, placeholders, weight)


@pytest.mark.some(cases=4)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_router_equals_the_formula(family: str) -> None:
    """Prefill, decoding, loss and gradients, the router's among them."""
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, SPARING, positions="original"):
        gates = shared_of(model)
        got = logits_of(model, inputs)
        sequences, steps = greedy(model, inputs, 3)
        with training(model):
            named = dict(model.named_parameters())
            loss = loss_of(model, inputs)
            found = gradients(model, loss)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = gated_logits(model, inputs, gates)
        without = gated_logits(model, inputs, replace(gates, shares=(1.0,) * 6))
    assert (got - expected)[real].abs().max() < EXACT
    assert (got - without)[real].abs().max() > 0.1
    tokens = sequences[:, inputs["input_ids"].shape[1] :]
    assert (steps - gated_steps(model, inputs, gates, tokens)).abs().max() < EXACT
    with training(model):
        logits = gated_logits(model, inputs, gates)
        vocab = model.config.get_text_config().vocab_size
        wanted = model.loss_function(logits=logits, labels=labels_of(inputs), vocab_size=vocab)
        every = torch.autograd.grad(
            wanted, list(named.values()), allow_unused=True, materialize_grads=True
        )
    assert abs(loss - wanted) < EXACT
    assert_equal(found, dict(zip(named, every, strict=True)), 1e-5)
    assert all(found[name].any() for name in found if "vispress_modules" in name)


@pytest.mark.some(cases=10)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_equals_the_formula(family: str, padding: str) -> None:
    model, inputs = model_of(family), inputs_of(family, padding)
    with compressed(model, METHOD) as report:
        weights = draw(model)
        got = logits_of(model, inputs)
        assert report.mean_keep_ratio == pytest.approx(sum(SHARES) / 6, abs=0.04)
        assert not any("untrained" in note for note in report.notes)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = gated_logits(model, inputs, gates_of(model, weights))
        without = gated_logits(model, inputs, gates_of(model, weights, (1.0,) * 6))
        others = {layer: (-w, b) for layer, (w, b) in weights.items()}
        another = gated_logits(model, inputs, gates_of(model, others))
    assert (got - expected)[real].abs().max() < EXACT
    assert (got - without)[real].abs().max() > 0.1, "nothing was skipped or scaled"
    assert (got - another)[real].abs().max() > 0.1, "routers do not matter"
    assert torch.equal(logits_of(model, inputs)[real], without[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decode_step_equals_the_formula(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, METHOD):
        weights = draw(model)
        sequences, got = greedy(model, inputs, 4)
    tokens = sequences[:, inputs["input_ids"].shape[1] :]
    expected = gated_steps(model, inputs, gates_of(model, weights), tokens)
    assert (got - expected).abs().max() < EXACT
    assert torch.equal(expected.argmax(-1), tokens)


@pytest.mark.some(cases=8)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_the_formula(family: str, padding: str) -> None:
    """Those of the routers, too: a token that runs and one that does not both have a part in it."""
    model, inputs = model_of(family), inputs_of(family, padding)
    labels = labels_of(inputs)
    with training(model), compressed(model, METHOD):
        weights = draw(model)
        named = dict(model.named_parameters())
        loss = loss_of(model, inputs)
        got = gradients(model, loss)
    with training(model):
        logits = gated_logits(model, inputs, gates_of(model, weights))
        vocab = model.config.get_text_config().vocab_size
        wanted = model.loss_function(logits=logits, labels=labels, vocab_size=vocab)
        found = torch.autograd.grad(
            wanted, list(named.values()), allow_unused=True, materialize_grads=True
        )
    assert abs(loss - wanted) < EXACT
    assert_equal(got, dict(zip(named, found, strict=True)), 1e-5)
    routers = {name: float(g.abs().sum()) for name, g in got.items() if "vispress" in name}
    assert len(routers) == 12
    assert {name for name, sum_ in routers.items() if sum_ == 0} == of_last(routers)


@contextmanager
def calls_checkpointed(model: Any, *, reentrant: bool) -> Iterator[None]:
    """Checkpoints around whole layers, their hooks inside, as transformers had them up to 5.17."""
    cls = type(model.model.language_model.layers[0])

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        run = partial(super(cls, layer).__call__, **kwargs)
        return checkpoint(run, *args, use_reentrant=reentrant)

    cls.__call__ = call
    try:
        yield
    finally:
        del cls.__call__


PLACES = {"forward": checkpointing, "call": calls_checkpointed}


@pytest.mark.some(cases=7)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_change_no_gradient(family: str, place: str) -> None:
    model, inputs = build(family), inputs_of(family)
    with training(model), compressed(model, METHOD):
        draw(model)
        plain = loss_of(model, inputs | {"use_cache": False})
        expected = backward(model, plain)
        with PLACES[place](model, reentrant=False):
            loss = loss_of(model, inputs | {"use_cache": False})
            got = backward(model, loss)
    assert torch.equal(loss, plain)
    assert_equal(got, expected)
    routers = {name for name in got if "vispress" in name}
    assert all(got[name].abs().sum() > 0 for name in routers - of_last(routers))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_reentrant_checkpoint_is_refused_by_name(place: str) -> None:
    model, inputs = build("llava"), inputs_of("llava")
    refusal = pytest.raises(CompressionStateError, match=r"reentrant.*'use_reentrant': False")
    with training(model), compressed(model, METHOD), PLACES[place](model, reentrant=True):
        with refusal:
            loss_of(model, inputs | {"use_cache": False})
        with torch.no_grad():
            loss_of(model, inputs | {"use_cache": False})  # there is no backward


def test_two_steps_of_training_move_every_router() -> None:
    model, inputs = build("llava"), inputs_of("llava")
    with training(model), compressed(model, METHOD):
        routers = {n: p for n, p in model.named_parameters() if "vispress_modules" in n}
        before = {name: p.detach().clone() for name, p in routers.items()}
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            backward_and_step(model, inputs, optimiser)
        assert len(routers) == 12
        still = {name for name, p in routers.items() if torch.equal(p, before[name])}
        assert still == of_last(routers)


def backward_and_step(model: Any, inputs: Any, optimiser: Any) -> Gradients:
    """A step of training; gives the gradients."""
    loss_of(model, inputs).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    optimiser.step()
    optimiser.zero_grad()
    return found


def test_a_chain_drops_gates_and_drops_again() -> None:
    """Behind DivPrune, before FastV: rows of the middle are scaled, whatever went before."""
    model, inputs = model_of("llava"), inputs_of("llava")
    routed = PMoD(beta=0.1, high=0.3, low=0.2)  # layers 2 to 5
    chain = [DivPrune(keep_ratio=0.5), routed]
    with compressed(model, chain, positions="original") as report:
        names = [n for n, _ in model.named_parameters() if "vispress_modules" in n]
        assert {name.split(".")[-3] for name in names} == {"1"}
        draw(model)
        got = logits_of(model, inputs)
        counts = [kept[0] for kept in report.visual_per_layer]
    assert counts == [18, 18, 4, 3, 3, 3]
    with compressed(model, [*chain[:1], METHOD], positions="original"):
        assert not torch.equal(logits_of(model, inputs), got)


@pytest.mark.parametrize("family", [*FAMILIES, *(f for f in NEWER if f == "gemma3")])
def test_the_branch_that_is_scaled_is_all_that_an_mlp_adds(family: str) -> None:
    """Without it a layer hands on what it had behind its attention, norms behind MLPs or not."""
    layer = build(family).model.language_model.layers[1]
    behind = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).double()
    rotary, noted = (torch.ones(1, 5, 16).double(), torch.zeros(1, 5, 16).double()), []
    handles = [
        behind.register_forward_pre_hook(lambda _, args: noted.append(args[0])),
        mlp_branch(layer).register_forward_hook(lambda _, args, out: out * 0),
    ]
    with torch.no_grad():
        out = layer(hidden, position_embeddings=rotary)
    for handle in handles:
        handle.remove()
    assert torch.equal(out[0] if isinstance(out, tuple) else out, noted[0])


@pytest.mark.parametrize("place", ["self_attn", "post_attention_layernorm", "mlp"])
def test_an_interrupted_layer_leaves_the_next_call_right(place: str) -> None:
    """Wherever it stops: behind the attention, the MLP's hook waits for a call that is gone."""
    model, inputs = model_of("llava"), inputs_of("llava")
    layers = model.model.language_model.layers

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with compressed(model, METHOD):
        draw(model)
        expected, kept = logits_of(model, inputs), []
        for number in (1, 3, 1, 2):
            handle = getattr(layers[number], place).register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt) as caught:
                logits_of(model, inputs)
            kept.append(caught)  # its traceback holds the call
            handle.remove()
            assert torch.equal(logits_of(model, inputs), expected)
    plain = logits_of(model, inputs)
    with compressed(model, PMoD(keep_ratio=1.0)):
        draw(model)
        assert torch.equal(logits_of(model, inputs), plain)


def test_threads_do_not_take_each_others_gates() -> None:
    model = model_of("llava")
    batches = [inputs_of("llava"), inputs_of("llava", "right")]
    with compressed(model, METHOD):
        draw(model)
        expected = [logits_of(model, inputs) for inputs in batches]

        def run(number: int) -> bool:
            return torch.equal(logits_of(model, batches[number]), expected[number])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, [0, 1] * 6))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_compiled_modules_scale_as_plain_ones(part: str) -> None:
    model, inputs = build("llava"), inputs_of("llava")
    compress_model(model, METHOD)
    draw(model)
    expected = logits_of(model, inputs)
    torch._dynamo.reset()
    layers = model.model.language_model.layers
    for module in [layers[2]] if part == "layer" else [layer.mlp for layer in layers]:
        module.compile(backend="eager")
    assert (logits_of(model, inputs) - expected).abs().max() < EXACT


def test_nothing_drops_in_gated_layers() -> None:
    with pytest.raises(ConfigError, match="acts until layer 6; order the chain by layer"):
        compress_model(model_of("llava"), [METHOD, FastV(keep_ratio=0.5, layer=5)])
