"""Hook of mkdocs: files of the repository that pages link to are published beside them.

Pages link to `../benchmarks/results/...` as they stand in the repository, so that links work there
too. What is linked is copied under `files/`, and what a copied page links to with it; a link to a
folder leads to its README. A link to what is not there fails the build.
"""

import logging
import re
from collections.abc import Callable
from os.path import relpath
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.publish")

ROOT: Final = Path(__file__).parents[1]
DOCS: Final = ROOT / "docs"
HOME: Final = "files"
LINK: Final = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page of `docs/` leads to."""
    waiting = [
        ((DOCS / page.src_uri).parent, page.content_string) for page in files.documentation_pages()
    ]
    found: set[Path] = set()
    while waiting:
        for target in _targets(*waiting.pop()):
            if DOCS in target.parents or target in found:
                continue
            found.add(target)
            if target.suffix == ".md":
                waiting.append((target.parent, target.read_text(encoding="utf-8")))
    for path in sorted(found):
        uri = f"{HOME}/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    uri = page.file.src_uri
    copied = uri.startswith(f"{HOME}/")
    folder = (ROOT / uri.removeprefix(f"{HOME}/") if copied else DOCS / uri).parent

    def rewrite(match: re.Match[str]) -> str:
        target = _target(match[2], folder)
        if target is None:
            return match[0]
        if DOCS in target.parents:
            there = target.relative_to(DOCS).as_posix()
        else:
            there = f"{HOME}/{target.relative_to(ROOT).as_posix()}"
        return f"{match[1]}{relpath(there, Path(uri).parent)}{match[3]}"

    return _outside_code(markdown, rewrite)


def _outside_code(markdown: str, rewrite: Callable[[re.Match[str]], str]) -> str:
    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if place % 2 else LINK.sub(rewrite, part) for place, part in enumerate(parts)
    )


def _targets(folder: Path, markdown: str) -> list[Path]:
    return [t for m in LINK.finditer(markdown) if (t := _target(m[2], folder)) is not None]


def _target(link: str, folder: Path) -> Path | None:
    """Find the file a link leads to; None for links to elsewhere, and to pages that are made."""
    if "://" in link or link.startswith(("mailto:", "#")):
        return None
    path = (folder / link).resolve()
    if path.is_dir():
        path /= "README.md"
    if path.is_file() and ROOT in path.parents:
        return path
    if DOCS not in path.parents:
        log.warning("%s: no file %s in the repository", folder.relative_to(ROOT), link)
    return None
