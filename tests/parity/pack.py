"""Pack a folder of vectors as `data` has them: `python -m tests.parity.pack FOLDER`.

One stored `.npz` a method, compressed as a whole: names and shapes of hundreds of small arrays cost
more apart than what is in them. Of large files some cases are left out.
"""

import io
import lzma
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 2, "pb": 2}]
"""For numbers of four bytes."""

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "dc2": ("tree_64", "tree_odd_67x45", "tree_depth_2", "tree_all_alike", "tree_none_alike"),
    "fastvid": ("ov_typical", "ov_long_segments"),
    "flashvlm": ("batch2",),
    "framefusion": ("many_merges", "no_text_around"),
    "hiprune": (
        *("llava576_t192", "anyres_t128_each", "alpha_half", "no_anchor", "retain_one"),
        *("retain_all", "border_anchors", "ties", "qwen_maps_3x4"),
    ),
    "hired": (
        *("next_2x2_r20", "tall_1x3_r10", "wide_padding_2x2", "alpha_025", "tiny_budget"),
        *("newline_kept", "llava15_r0333"),
    ),
    "llava_scissor": ("sampled_eps_05", "sampled_eps_04"),
    "mmtok": ("llava576_t64", "odd_105_t33", "alpha_0", "one_word_keep_one", "alpha_2"),
    "openvino_cdpruner": (
        *("image_split_w05", "image_whole_w05", "weight_0", "weight_1", "frames4"),
        "fallback_kernel",
    ),
    "prunevid": ("mostly_static", "odd_17_frames"),
    "scm": ("typical_2x3", "large_1x4"),
    "scope": ("llava576_t64", "anyres5_t160"),
    "v2drop": ("llava_long_text", "qwen_typical"),
    "vidcom2": ("r15",),
    "visiontrim": ("n100_48_16", "batch2", "no_complement"),
    "vscan": ("t192", "t64_divides", "t101_odd", "batch2_t96", "least_32"),
}
"""By file, cases that are too large for the repository. Each was green when its file was packed:
`VISPRESS_PARITY_DIR=FOLDER pytest tests/parity` runs them again. DC2's trees are of pixels, which
no method here has.
"""


def pack(path: Path) -> bytes:
    """Compress what the repository keeps of a file of vectors."""
    left_out = LEFT_OUT.get(path.stem, ())
    with np.load(path, allow_pickle=False) as file:
        kept = {name: file[name] for name in file.files if name.split("/")[0] not in left_out}
    stored = io.BytesIO()
    np.savez(stored, **kept)
    return lzma.compress(stored.getvalue(), format=lzma.FORMAT_XZ, filters=FILTERS)


if __name__ == "__main__":
    names = sys.argv[2:] or [path.name.split(".")[0] for path in DATA.glob("*.npz.xz")]
    for name in sorted(names):
        (DATA / f"{name}.npz.xz").write_bytes(pack(Path(sys.argv[1]) / f"{name}.npz"))
