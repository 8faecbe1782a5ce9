"""lmms-eval models whose visual tokens are compressed.

Found by lmms-eval (0.7 and later) through the entry-point group `lmms_eval.models`:

    lmms-eval --model vispress_qwen2_5_vl --tasks gqa --batch_size 1 \\
        --model_args pretrained=Qwen/Qwen2.5-VL-3B-Instruct,method=fastv,keep_ratio=0.25

Every argument of lmms-eval's own model is passed on; `method`, its budget and hyper-parameters,
`config`, `positions` and `backend` are those of `compress_model`, `method=none` is the baseline.
Take the baseline through the same model: lmms-eval chooses prompts by the model's name, so that
`qwen2_5_vl` itself may be asked in other words than `vispress_qwen2_5_vl`.
"""

import inspect
from typing import Any, Final

from vispress.errors import ConfigError
from vispress.integrations.options import Tally, read_compression, watch
from vispress.integrations.scoring import scoring

MODELS: Final = {
    "vispress_llava_hf": "llava_hf",
    "vispress_qwen2_5_vl": "qwen2_5_vl",
    "vispress_qwen3_vl": "qwen3_vl",
}
"""Our models, and lmms-eval's that they are built on."""
_KINDS: Final = ("chat", "simple")


def manifests() -> list[Any]:
    """What the entry point hands to lmms-eval's registry; models are imported when one is asked."""
    from lmms_eval.models.registry_v2 import ModelManifest

    paths = [
        (name, [f"{__name__}.{kind}_{base}" for kind in _KINDS]) for name, base in MODELS.items()
    ]
    return [
        ModelManifest(model_id=name, chat_class_path=chat, simple_class_path=simple)
        for name, (chat, simple) in paths
    ]


def __getattr__(name: str) -> Any:
    """`chat_llava_hf`, `simple_qwen3_vl` and so on: made from lmms-eval's model on first use."""
    kind, _, base = name.partition("_")
    if kind not in _KINDS or base not in MODELS.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = compressed_class(_model_class(base, kind))
    globals()[name] = found
    return found


def compressed_class(base: type) -> type:
    """A subclass of an lmms-eval model that takes the arguments of `compress_model` too."""
    names = {"__doc__": base.__doc__, "__module__": __name__}
    return type(f"Vispress{base.__name__}", (_Compressed, base), names)


def _model_class(base: str, kind: str) -> type:
    from lmms_eval.models import get_model

    try:
        found: type = get_model(base, force_simple=kind == "simple")
    except ValueError as error:
        raise ConfigError(f"this lmms-eval has no model {base!r} to build on") from error
    if getattr(found, "is_simple", True) != (kind == "simple"):
        raise ConfigError(f"this lmms-eval has no {kind} form of {base!r}")
    return found


class _Compressed:
    """Put before an lmms-eval model: compresses what it loads, and reports what was kept."""

    def __init__(self, **arguments: Any) -> None:
        parameters = inspect.signature(super().__init__).parameters
        own = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        # the command line passes it to every model; those built on here do not know it
        arguments.pop("max_batch_size", None)
        rest = {key: arguments.pop(key) for key in list(arguments) if key in own}
        compression = read_compression(arguments, sorted(own))
        if rest.get("trust_remote_code"):
            raise ConfigError(
                f"trust_remote_code={rest['trust_remote_code']} is refused: every model that can "
                "be compressed is part of transformers; leave it out"
            )
        pretrained = rest.get("pretrained", parameters["pretrained"].default)
        options = {key: rest[key] for key in ("revision",) if key in rest}
        compression.check(pretrained, **options)
        super().__init__(**rest)
        self.compression, self.kept = compression, Tally()
        model: Any = self.model  # type: ignore[attr-defined]
        compression.apply(model)
        watch(model, compression, self.kept)

    def generate_until(self, requests: Any) -> Any:
        """As lmms-eval's model; raises what it would turn into empty answers."""
        self.kept.clear()
        return self._reported(super().generate_until(requests))  # type: ignore[misc]

    def generate_until_multi_round(self, requests: Any) -> Any:
        """As lmms-eval's model; raises what it would turn into empty answers."""
        self.kept.clear()
        return self._reported(super().generate_until_multi_round(requests))  # type: ignore[misc]

    def loglikelihood(self, requests: Any) -> Any:
        """As lmms-eval's model, by what the prompt alone would keep; the answer has no say."""
        self.kept.clear()
        with scoring(self, self.compression, self.kept):
            scores = super().loglikelihood(requests)  # type: ignore[misc]
        return self._reported(scores)

    def _reported(self, answers: Any) -> Any:
        if self.kept.error is not None:
            raise self.kept.error
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        # no tokens and no time: these are added up with those that the model has logged
        log_metrics(0.0, 0, 0.0, additional_metrics=self.kept.averages())
        return answers
