"""`vispress show`: which tokens methods keep of a picture, and what the model then answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vispress.analysis.sources import SCENE, check_source
from vispress.cli_options import Device, Imports, Model, check_early, prepare, terminal
from vispress.errors import ConfigError
from vispress.user_code import import_files

if TYPE_CHECKING:
    from vispress.methods.base import Compressor


def show(
    image: Annotated[str, typer.Argument(help="An image file, or scene:SEED for a drawn one.")],
    method: Annotated[list[str], typer.Option(help="Repeat to compare several.")],
    question: Annotated[
        str | None, typer.Option(help="Words, or for scene:SEED the name of a task.")
    ] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    num_tokens: Annotated[int | None, typer.Option(help="In place of --keep-ratio.")] = None,
    layer: Annotated[int | None, typer.Option(help="For methods with one layer.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, a hyper-parameter (YAML).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("kept.png"),
    model: Model = None,
    encoder: Annotated[
        Path | None,
        typer.Option(help="A vision encoder's folder: tokens are chosen without a language model."),
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side, with --encoder; its own otherwise.")
    ] = None,
    device: Device = "cpu",
    imports: Imports = None,
) -> None:
    """Draw which tokens methods keep of a picture.

    The model's answers stand beside them.
    """
    check_source(image, "no question" if encoder is not None else question)
    if encoder is not None and image.startswith(SCENE):
        raise ConfigError("--encoder is for photographs; a drawn scene is for the reference model")
    check_early(methods=() if imports else method, model=model, keep_ratio=keep_ratio)
    import_files(imports or ())
    from vispress.method_options import make_all, parse_options

    given = {"keep_ratio": keep_ratio, "num_tokens": num_tokens, "layer": layer}
    values = {k: v for k, v in given.items() if v is not None} | parse_options(option or [])
    chosen = make_all(method, values)
    if encoder is not None:
        draw_encoded(Path(image), chosen, out, encoder, side)
    else:
        draw(image, question, chosen, out, model or "reference", device)


def draw_encoded(
    image: Path, chosen: "list[Compressor]", out: Path, encoder: Path, side: int | None
) -> None:
    """Draw what compressors keep of a photograph by what a vision encoder alone gives.

    Args:
        image: The picture.
        chosen: The compressors.
        out: The drawing.
        encoder: As `load_encoder` takes it.
        side: Likewise.
    """
    prepare()
    from vispress.analysis.encoder_tokens import choose, load_encoder
    from vispress.analysis.inspect import View
    from vispress.analysis.overlay import draw_views
    from vispress.picture_files import open_picture

    console = terminal()
    picture = open_picture(image, str(image))
    with console.status("asking the encoder"):
        tokens, seen = load_encoder(encoder, side).see(picture)
        found = [(method, choose(method, tokens)) for method in chosen]
    views = [
        View(f"{method.name} ({'merges' if method.merges else 'prunes'})", "", kept, share)
        for method, kept in found
        for share in (kept.num_kept / kept.num_visual,)
    ]
    table = Table("method", "kept")
    for view in views:
        assert view.image is not None
        table.add_row(view.title, f"{view.image.num_kept} of {view.image.num_visual}")
    console.print(table)
    draw_views(seen, views, image.name, out)
    console.print(f"written: {out}", soft_wrap=True)


def draw(
    image: str, question: str | None, chosen: "list[Compressor]", out: Path, model: str, device: str
) -> None:
    """Draw what compressors keep of a picture, and print a table with the model's answers.

    Args:
        image: As `open_prompt` takes it.
        question: Likewise.
        chosen: The compressors.
        out: The picture.
        model: A model's name.
        device: Where it runs.
    """
    prepare()
    from vispress.analysis.inspect import inspect, open_prompt, unknown_words
    from vispress.analysis.overlay import draw_views, seen_picture
    from vispress.bench.model.loaded_model import load_named_model

    prompt = open_prompt(image, question)
    console = terminal()
    with console.status("loading the model"):
        loaded = load_named_model(model, device)
    if words := unknown_words(loaded, prompt):
        console.print(f"the model does not know: {', '.join(words)}", style="yellow")
    with console.status("asking the model"):
        views = inspect(loaded, prompt, chosen, None)
    asked = prompt.text.removeprefix("<image>").removesuffix(":").strip()
    table = Table("method", "answer", "kept at the end", "mean over layers", title=asked)
    for view in views:
        end = "" if view.image is None else f"{view.image.num_kept} of {view.image.num_visual}"
        table.add_row(view.title, view.answer, end, f"{100 * view.mean_keep_ratio:.1f} %")
    console.print(table)
    if prompt.answer:
        console.print(f"right answer: {prompt.answer}")
    picture = seen_picture(loaded, prompt)
    evidence = prompt.evidence[0] if prompt.evidence else ()
    draw_views(picture, views, asked, out, evidence=evidence, truth=prompt.answer)
    console.print(f"written: {out}", soft_wrap=True)
