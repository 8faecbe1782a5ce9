"""VipLLaVA: three layers of a CLIP tower side by side."""

from tests.families import Family

FAMILIES = (
    Family(
        name="vipllava",
        like="llava",
        model="VipLlava",
        special={"vision_feature_layer": [-1, -3, 1]},
        ids=("image_token_index",),
        needs="5.24",
    ),
)
