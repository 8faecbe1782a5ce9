"""LLaVA-NeXT-Video: AnyRes images, and videos whose frames are pooled ahead of the projector."""

from tests.families import Family

FAMILIES = (
    Family(
        name="llava_next_video",
        like="llava_next",
        model="LlavaNextVideo",
        ids=("image_token_index", "video_token_index"),
        videos=True,
        needs="5.24",
    ),
)
