"""`vispress probe arank`: which layers of a user's model can spare tokens, as a configuration."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from vispress.checks import check_choice, check_number
from vispress.cli_options import (
    Asked,
    Data,
    Device,
    Loaded,
    Precision,
    check_early,
    check_file,
    prepare,
    terminal,
    tracked,
)
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from vispress.bench.model.loaded_model import Dtype

probe = typer.Typer(
    help="Measure a model for a method's settings.", no_args_is_help=True, rich_markup_mode=None
)


@probe.command()
def arank(
    data: Data = None,
    question: Asked = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 50,
    share: Annotated[
        float, typer.Option(help="Of all layers but the first, those of the lowest rank.")
    ] = 0.5,
    threshold: Annotated[
        float | None, typer.Option(help="In place of a share: all layers of a lower rank.")
    ] = None,
    capacity: Annotated[float, typer.Option(help="Written to the file.")] = 0.5,
    out: Annotated[Path, typer.Option(help="The configuration.")] = Path("gamma_mod.yaml"),
    model: Loaded = "reference",
    seed: Annotated[int, typer.Option(help="Which pictures or questions are drawn.")] = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Rank the attention maps of each layer, and write gamma-MoD with layers of a low rank."""
    check_early(model=model)
    prepare()
    from rich.table import Table

    from vispress.analysis.attention_ranks import choose_layers, mean_ranks
    from vispress.analysis.fit_debias import draw_prompts
    from vispress.bench.model.loaded_model import DTYPES, load_named_model
    from vispress.config import save_config
    from vispress.methods.gamma_mod import GammaMoD

    check_choice("dtype", dtype, DTYPES)
    check_number("share", share, low=0.0, high=1.0)
    method = GammaMoD(capacity=capacity)
    check_file(out)
    loaded = load_named_model(model, device, cast("Dtype", dtype))
    drawn, asked = draw_prompts(data, question or [], samples, seed, loaded), count()
    prompts = (prompt for prompt, _ in zip(drawn, asked, strict=False))  # how many, is told below
    console = terminal()
    seen = tracked(prompts, samples, "ranking attention maps", console)
    ranks = mean_ranks(loaded, seen).tolist()
    layers = choose_layers(ranks, share=share, threshold=threshold)
    table = Table("layer", "rank", "MoD")
    for layer, rank in enumerate(ranks):
        table.add_row(str(layer), f"{rank:.1f}", "yes" if layer in layers else "")
    console.print(table)
    origin = (
        f"Layers chosen by vispress probe arank on {next(asked)} prompts of "
        f"{data or 'reference scenes'}\nwith {loaded.name}, weights {loaded.weights}."
    )
    try:
        save_config(replace(method, layers=layers), out, origin=origin)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error
    console.print(f"written: {out}", soft_wrap=True)
