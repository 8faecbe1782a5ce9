"""Refuse, when a model is compressed, what can be known then not to work."""

import sys
from collections.abc import Iterable

from torch import nn

from vispress.errors import CompressionStateError, UnsupportedModelError
from vispress.runtime.hooks.head_shards import find_shards
from vispress.runtime.plan.plan import Plan


def refuse_partitioned(weights: Iterable[object]) -> None:
    """Refuse weights that DeepSpeed's ZeRO-3 has partitioned: they are empty where they are read.

    Raises:
        UnsupportedModelError: Says what would work.
    """
    for weight in weights:
        if hasattr(weight, "ds_id"):
            raise UnsupportedModelError(
                "DeepSpeed ZeRO-3 has partitioned the model's weights, and brings them together "
                "for calls of whole modules only, where compression also runs parts of them; use "
                "ZeRO-2, FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel"
            )


_WRAPPERS = {
    "DistributedDataParallel": "torch.nn.parallel",
    "FullyShardedDataParallel": "torch.distributed.fsdp",
    "FSDPModule": "torch.distributed.fsdp",
}


def refuse_late_parameters(model: nn.Module, plan: Plan) -> None:
    """Refuse methods with parameters on a model that data parallelism has wrapped already.

    Raises:
        CompressionStateError: Says what would work.
    """
    if not plan.trained:
        return
    for name, home in _WRAPPERS.items():
        wrapper = getattr(sys.modules.get(home), name, None)
        if wrapper is not None and any(isinstance(module, wrapper) for module in model.modules()):
            names = ", ".join(method.name for method in plan.methods if method.trained)
            raise CompressionStateError(
                f"{names} has parameters, whose gradients {name} would not share among processes, "
                "as it has wrapped the model already; call compress_model first"
            )


def refuse_sharded_encoder(model: nn.Module, plan: Plan) -> None:
    """Refuse methods that read or merge in a vision encoder whose heads several processes share.

    Raises:
        UnsupportedModelError: Says what would work.
    """
    attentions = plan.adapter.encoder_attentions() if plan.encoder_readers else ()
    if attentions and find_shards(model, attentions[0]) is not None:
        raise UnsupportedModelError(
            f"{' and '.join(plan.encoder_readers)}: the heads of the vision encoder are dealt out "
            "to several processes, and each would score by its own; leave the encoder out of the "
            "tensor-parallel plan (as transformers' plans do), or use a method that reads features "
            "(divprune) or the LLM's attention (fastv)"
        )
