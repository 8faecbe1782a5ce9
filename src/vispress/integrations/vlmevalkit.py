"""VLMEvalKit with compressed models: registers one at run time, then runs VLMEvalKit's `run.py`.

    python -m vispress.integrations.vlmevalkit --model Qwen2.5-VL-7B-Instruct \\
        --method fastv --keep-ratio 0.25 -- --data MMBench_DEV_EN --mode infer

`--model` is a name that VLMEvalKit knows: its own class, with its own prompts, is then compressed.
Or it is the folder or hub id of any checkpoint that vispress supports, which gets the dataset's
prompts through its chat template. `--method none` is the baseline. None of VLMEvalKit's files is
changed; what stands behind `--` goes to `run.py` as it is, `--model` excepted.
"""

import argparse
import difflib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from torch import nn

from vispress.bench.model.checkpoints import load_checkpoint
from vispress.bench.model.loaded_model import DTYPES
from vispress.bench.model.names import HUB_ID
from vispress.bench.tasks.rows import open_pictures
from vispress.bench.tasks.task import MARK, Prompt
from vispress.checks import suggest
from vispress.errors import CheckpointError, ConfigError, UnsupportedModelError, VispressError
from vispress.integrations.options import Compression, Tally, read_compression, watch
from vispress.method_options import parse_options

_OURS: Final = ("--model", "--config")
"""Options of `run.py` that the launcher sets, or that would leave out the registered model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an expected error is one line on stderr and exit code 2."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    try:
        own, rest = parse(sys.argv[1:] if arguments is None else arguments)
        tally = Tally()
        compression = read_compression(own["compression"])
        name = register(own["model"], compression, tally, **own["checkpoint"])
        console.print(f"vispress: {name} is registered", highlight=False)
        run(own["run"] or find_run(), ["--model", name, *rest])
        if tally.error is not None:
            # VLMEvalKit logs what breaks a dataset, and goes on with the next
            raise tally.error
        kept = ", ".join(f"{key} {value:.4g}" for key, value in tally.averages().items())
        console.print(f"vispress: {tally.prompts} prompts; a prompt: {kept}", highlight=False)
    except VispressError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our options, and those of `run.py` behind `--`.

    Raises:
        ConfigError: An option of `run.py` that is set here.
    """
    parser = argparse.ArgumentParser(prog="vispress.integrations.vlmevalkit", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="VLMEvalKit's name, a folder or a hub id")
    parser.add_argument("--method", help="a method, or none for the uncompressed baseline")
    parser.add_argument("--compression", help="a YAML file in place of --method")
    parser.add_argument("--keep-ratio", type=float)
    parser.add_argument("--num-tokens", type=int)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, a hyper-parameter")
    parser.add_argument("--run", type=Path, help="VLMEvalKit's run.py, if it is not found")
    group = parser.add_argument_group("for a folder or hub id")
    group.add_argument("--device", default="cuda", help="cuda, cpu, or auto to spread it")
    group.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    group.add_argument("--max-new-tokens", type=int, default=512)
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:split])
    rest = list(arguments[split + 1 :])
    for option in rest:
        if option.partition("=")[0] in _OURS:
            raise ConfigError(f"{option} behind '--' is not allowed; the launcher names the model")
    budget = {"keep_ratio": given.keep_ratio, "num_tokens": given.num_tokens}
    chosen = {"method": given.method, "config": given.compression}
    checkpoint = {
        "device": given.device,
        "dtype": DTYPES[given.dtype],
        "max_new_tokens": given.max_new_tokens,
    }
    own = {
        "model": given.model,
        "run": given.run,
        "compression": chosen | budget | parse_options(given.set),
        "checkpoint": checkpoint,
    }
    return own, rest


def register(model: str, compression: Compression, tally: Tally, **checkpoint: Any) -> str:
    """Add a compressed model to VLMEvalKit's registry (a dictionary), for this process.

    Args:
        model: VLMEvalKit's name, a folder or a hub id.
        compression: What is done to it.
        tally: Counts what it keeps.
        **checkpoint: `device`, `dtype` and `max_new_tokens` for a folder or hub id.

    Returns:
        The name it is registered by, which also names VLMEvalKit's files.

    Raises:
        ConfigError: VLMEvalKit is not installed.
        VispressError: The method does not work on the model, as far as its configuration tells.
    """
    registry = _registry()
    known = registry.get(model)
    name = f"{Path(model).name}--{re.sub(r'[^A-Za-z0-9._=-]+', '-', compression.label)}"
    build: Callable[..., Any]
    if known is not None:
        _check_early(getattr(known, "keywords", {}).get("model_path"), compression)
        build = _compressed_builder(known, model, compression, tally)
    elif Path(model).is_dir() or re.fullmatch(HUB_ID, model):
        _check_early(model, compression)
        build = _checkpoint_builder(model, compression, tally, checkpoint)
    else:
        raise ConfigError(
            f"VLMEvalKit has no model {model!r}, and it is no folder and no hub id (org/name); "
            + suggest(model, difflib.get_close_matches(model, registry, n=5, cutoff=0.3))
        )
    registry[name] = _remembering(build, tally)
    return name


def find_run() -> Path:
    """`run.py` of the installed VLMEvalKit: in the package, or beside it in a checkout.

    Raises:
        ConfigError: It is in neither place.
    """
    spec = find_spec("vlmeval")
    assert spec is not None  # `register` has imported it
    for folder in spec.submodule_search_locations or ():
        for path in (Path(folder) / "run.py", Path(folder).parent / "run.py"):
            if path.is_file():
                return path
    raise ConfigError("cannot find VLMEvalKit's run.py; name it with --run")


def run(script: Path, arguments: list[str]) -> None:
    """Run a script as if from the command line, in this process."""
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def _registry() -> dict[str, Callable[..., Any]]:
    try:
        from vlmeval.config import supported_VLM
    except ModuleNotFoundError as error:
        if error.name == "vlmeval":
            raise ConfigError(
                "VLMEvalKit is not installed; see https://github.com/open-compass/VLMEvalKit"
            ) from error
        raise ConfigError(f"VLMEvalKit cannot be imported: {error}") from error
    found: dict[str, Callable[..., Any]] = supported_VLM
    return found


def _check_early(path: str | None, compression: Compression) -> None:
    """Refuse before weights are read, where VLMEvalKit says which checkpoint it will load."""
    if path is None:
        return
    try:
        compression.check(path)
    except CheckpointError:  # not at hand, or of a kind that VLMEvalKit loads: loading will tell
        return


def _remembering(build: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """A builder whose error is kept for the end of the run."""

    def built(**options: Any) -> Any:
        try:
            return build(**options)
        except Exception as error:
            tally.error = error
            raise

    return built


def _compressed_builder(
    build: Callable[..., Any], name: str, compression: Compression, tally: Tally
) -> Callable[..., Any]:
    def compressed(**options: Any) -> Any:
        if options.get("use_vllm"):
            raise UnsupportedModelError("vLLM runs its own models; leave --use-vllm out")
        made = build(**options)
        model = getattr(made, "model", None)
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"VLMEvalKit's {name} holds no Hugging Face model (its .model is "
                f"{type(model).__name__}); give --model the folder or hub id of a checkpoint"
            )
        compression.apply(model)
        watch(model, compression, tally)
        return made

    return compressed


def _checkpoint_builder(
    path: str, compression: Compression, tally: Tally, options: dict[str, Any]
) -> Callable[..., Any]:
    from vlmeval.vlm.base import BaseModel

    length = options.pop("max_new_tokens")

    class Compressed(BaseModel):  # type: ignore[misc]
        """A checkpoint that answers VLMEvalKit's messages through its chat template."""

        INTERLEAVE = True

        def __init__(self) -> None:
            super().__init__()
            self.loaded = load_checkpoint(path, **options)
            compression.apply(self.loaded.model)
            watch(self.loaded.model, compression, tally)

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            texts, images = [], []
            for part in message:
                if part["type"] == "image":
                    texts.append(MARK)
                    images += open_pictures(part["value"], Path())
                elif part["type"] == "text":
                    texts.append(part["value"].replace(MARK, ""))
                else:
                    raise UnsupportedModelError(f"{part['type']} input is not supported here")
            prompt = Prompt(tuple(images), "\n".join(texts), "")
            return self.loaded.answer([prompt], length)[0]

    return Compressed


if __name__ == "__main__":
    sys.exit(main())
