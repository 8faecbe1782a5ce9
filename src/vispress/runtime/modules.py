"""Put the parameters of compressors under the base model, find them there, take them out again.

They are one child of the base model, so that whatever walks a model (optimisers, `.to`, `deepcopy`,
DDP, FSDP, PEFT) has them once. Nothing keeps a reference: who wraps or copies the child may put
another module in its place, and a call finds what stands there then.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from vispress.adapters.base import ModelAdapter
from vispress.errors import CompressionStateError, ConfigError
from vispress.methods.base import Compressor
from vispress.types import ModuleShape

MODULES: Final = "vispress_modules"
"""Name of the child."""
_UNSAVED: Final = "_keys_to_ignore_on_save"


class VispressModules(nn.Module):
    """Parameters of a chain of compressors, each under its place in the chain.

    A class of its own, called as a whole: PEFT copies no plain container in `modules_to_save`, and
    FSDP brings the weights together when a module is called.

    Args:
        made: Modules by place, from `make_modules`.
    """

    def __init__(self, made: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for place, module in made.items():
            self.add_module(place, module)

    def forward(self, place: str, *args: Any, **kwargs: Any) -> Any:
        """Call the module of the compressor at a place of the chain."""
        return self.get_submodule(place)(*args, **kwargs)


def shape_of(adapter: ModelAdapter) -> ModuleShape:
    """Read off a model what parameters are sized by."""
    config = adapter.language_model.config
    linears = (m for m in adapter.projector.modules() if hasattr(m, "in_features"))
    first: Any = next(linears, None)
    matrices = (p for p in adapter.projector.parameters() if p.ndim == 2)
    norms = (p for block in adapter.encoder_blocks() for p in block.norm.parameters())
    norm = next(norms, None)
    return ModuleShape(
        width=config.hidden_size,
        vision_width=next(matrices).shape[0] if first is None else first.in_features,
        num_layers=len(adapter.decoder_layers),
        num_heads=config.num_attention_heads,
        vision_layers=len(adapter.encoder_attentions()),
        encoder_width=None if norm is None else norm.shape[0],
    )


def make_modules(adapter: ModelAdapter, methods: Sequence[Compressor]) -> dict[str, nn.Module]:
    """Make fresh parameters of the compressors that have any, by place in the chain.

    In fp32 on the host: a ranking must not move with the model's precision. What is drawn at random
    is drawn from a seed of its own, and the global one stays as it was.
    """
    made: dict[str, nn.Module] = {}
    if not any(method.trained for method in methods):
        return made
    shape = shape_of(adapter)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        for place, method in enumerate(methods):
            module = method.make_module(shape)
            if module is not None:
                made[str(place)] = module.float()
    return made


def put_modules(
    adapter: ModelAdapter, owner: nn.Module | None, methods: Sequence[Compressor]
) -> Sequence[Callable[[], None]]:
    """Put fresh parameters under the base model, where its first layer computes.

    `save_pretrained` of the base model and of its owner leaves them out.

    Returns:
        What takes them out; nothing where no method has any.
    """
    if not (made := make_modules(adapter, methods)):
        return ()
    base = adapter.base
    child = VispressModules(made).to(_device_of(adapter.decoder_layers[0]))
    base.add_module(MODULES, child.train(base.training))
    saved = [one for one in (base, owner) if one is not None and hasattr(one, _UNSAVED)]
    before = [one.__dict__.get(_UNSAVED) for one in saved]
    _leave_out(saved)
    return (partial(_take_out, base), partial(_save_again, saved, before))


def missing_modules(
    adapter: ModelAdapter, owner: nn.Module | None, methods: Sequence[Compressor]
) -> Callable[[], None]:
    """Find what other settings need beyond what is there; what is there stays, trained or not.

    Returns:
        What adds it.

    Raises:
        ConfigError: Parameters of the same name have other shapes.
        CompressionStateError: Some are missing, and what they belong under was wrapped.
    """
    base, made = adapter.base, make_modules(adapter, methods)
    fresh, child, now = VispressModules(made), base._modules.get(MODULES), held(base)
    own = {} if now is None else dict(now.named_parameters())
    for name, parameter in fresh.named_parameters():
        if name in own and own[name].shape != parameter.shape:
            raise ConfigError(
                f"the parameter {name} would have the shape {tuple(parameter.shape)} and has "
                f"{tuple(own[name].shape)}; call remove_compression(model), then compress_model"
            )
    missing = [name for name, _ in fresh.named_parameters() if name not in own]
    if missing and type(child) is not VispressModules:
        raise CompressionStateError(
            f"the new settings need the parameter {missing[0]}, which is not there, and "
            f"{MODULES} is a {type(child).__name__} by now; call update_compression before what "
            "wraps it"
        )
    if not missing:
        return _nothing
    fresh.to(_device_of(adapter.decoder_layers[0])).train(base.training)
    return partial(_add, [one for one in (base, owner) if one is not None], child, fresh)


def untrained(adapter: ModelAdapter, methods: Sequence[Compressor]) -> list[str]:
    """Say which methods have the parameters that they began with; shards cannot tell."""
    found, module = [], held(adapter.base)
    now = {} if module is None else dict(module.named_parameters())
    for place, begun in make_modules(adapter, methods).items():
        pairs = [(now[f"{place}.{name}"], p) for name, p in begun.named_parameters()]
        if pairs and all(_same(*pair) for pair in pairs):
            found.append(
                f"{methods[int(place)].name}: untrained, its parameters are those that it began "
                f"with, and {methods[int(place)].untrained}"
            )
    return found


def held(base: nn.Module) -> nn.Module | None:
    """Find the parameters that calls use now, behind what PEFT put around them."""
    child: Any = base._modules.get(MODULES)
    copies = getattr(child, "modules_to_save", None)
    if copies is None:
        return child  # type: ignore[no-any-return]
    active = child.active_adapter
    module: nn.Module = copies[active if isinstance(active, str) else active[0]]
    return module


def module_of(base: nn.Module, compressor: int) -> Callable[..., Any]:
    """Find what calls a compressor's module, by way of what stands at its parent now."""
    return partial(getattr(base, MODULES), str(compressor))


def _graft(onto: nn.Module, fresh: nn.Module) -> None:
    for name, module in fresh.named_children():
        if name in onto._modules:
            _graft(onto.get_submodule(name), module)
        else:
            onto.add_module(name, module)
    for name, parameter in fresh.named_parameters(recurse=False):
        if name not in onto._parameters:
            onto.register_parameter(name, parameter)


def _add(saved: Sequence[nn.Module], child: nn.Module, fresh: nn.Module) -> None:
    _graft(child, fresh)
    _leave_out([one for one in saved if hasattr(one, _UNSAVED)])


def _leave_out(saved: Sequence[nn.Module]) -> None:
    """Name what `save_pretrained` is not to write: transformers asks the instance."""
    for one in saved:
        own = {name for name, _ in one.named_parameters() if f".{MODULES}." in f".{name}"}
        one.__dict__[_UNSAVED] = {*(getattr(one, _UNSAVED) or ()), *own}


def _save_again(saved: Sequence[nn.Module], before: Sequence[Any]) -> None:
    for one, names in zip(saved, before, strict=True):
        del one.__dict__[_UNSAVED]
        if names is not None:
            one.__dict__[_UNSAVED] = names


def _same(parameter: nn.Parameter, begun: nn.Parameter) -> bool:
    if hasattr(parameter, "full_tensor"):
        return False
    return torch.equal(parameter.detach().to(begun), begun.detach())


def _nothing() -> None:
    pass


def _take_out(base: nn.Module) -> None:
    base._modules.pop(MODULES, None)


def _device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes, also one whose weights are offloaded."""
    hook: Any = getattr(layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(layer.parameters()).device if device is None else torch.device(device)
