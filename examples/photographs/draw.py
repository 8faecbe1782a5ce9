"""Draw what four methods keep of scikit-image's photographs: README's first picture.

    python examples/photographs/encoder.py dinov2-small
    python examples/photographs/draw.py dinov2-small docs/pictures/kept.jpg

At 336 pixels the encoder gives 24 x 24 = 576 tokens, as many as LLaVA-1.5's; 64 are kept.
"""

import sys
from pathlib import Path

import numpy as np
import skimage
from matplotlib.figure import Figure

from vispress.analysis.encoder_tokens import choose, load_encoder
from vispress.methods import DivPrune, FasterVLM, VisionZip, VisPruner
from vispress.picture_files import open_picture

PHOTOGRAPHS = ("coffee.png", "astronaut.png", "rocket.jpg")
METHODS = {
    "DivPrune": DivPrune(num_tokens=64),
    "FasterVLM": FasterVLM(num_tokens=64),
    "VisPruner": VisPruner(num_tokens=64),
    "VisionZip (merges)": VisionZip(num_tokens=64),
}
DIM = 0.22


def main(folder: Path, out: Path) -> None:
    """One row a photograph: whole, then as each method leaves it."""
    encoder = load_encoder(folder, side=336)
    wide, high = len(METHODS) + 1, len(PHOTOGRAPHS)
    figure = Figure(figsize=(2.0 * wide, 2.0 * high + 0.3), layout="constrained")
    panels = figure.subplots(high, wide)
    for row, name in zip(panels, PHOTOGRAPHS, strict=True):
        photograph = Path(skimage.__file__).parent / "data" / name
        tokens, seen = encoder.see(open_picture(photograph, name))
        pictures = [("576 tokens", seen)]
        for title, method in METHODS.items():
            kept = choose(method, tokens)
            light = np.full(kept.num_visual, DIM)
            light[list(kept.kept)] = 1.0
            side = seen.shape[0] // kept.grid[1]
            mask = np.kron(light.reshape(kept.grid[1:]), np.ones((side, side)))
            pictures.append((f"{title}: {kept.num_kept}", seen * mask[..., None]))
        for axes, (title, picture) in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            if name == PHOTOGRAPHS[0]:
                axes.set_title(title, fontsize=10)
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "kept.jpg"))
