"""Write compressors of a reference model with parameters in half precision, to be committed.

    python -m benchmarks.halved out/covipal out/hicom --into benchmarks/results/trained

What is measured is what is written here: parameters are fp32 again once they are loaded.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn


def module_of(model: nn.Module) -> nn.Module:
    """Find the parameters of a compressed model's methods."""
    from vispress.adapters.base import find_adapter
    from vispress.runtime.modules import held

    found = held(find_adapter(model).base)
    assert found is not None  # trained methods have some
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Write each folder's halves, with its card's data and its curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="of vispress train-compressor")
    parser.add_argument("--into", type=Path, required=True, help="where they get their names again")
    parser.add_argument("--model", default="reference", help="that they were trained on")
    args = parser.parse_args(words)
    from vispress import compress_model, remove_compression, save_compression
    from vispress.bench.model.loaded_model import load_named_model

    model = load_named_model(args.model, "cpu", "fp32").model
    for folder in args.folders:
        card = json.loads((folder / "vispress.json").read_text(encoding="utf-8"))
        compress_model(model, config=folder)
        module_of(model).half()
        save_compression(model, args.into / folder.name, data=card["data"])
        remove_compression(model)
        if (folder / "curve.json").exists():
            shutil.copy(folder / "curve.json", args.into / folder.name)
        print(args.into / folder.name)


if __name__ == "__main__":
    main()
