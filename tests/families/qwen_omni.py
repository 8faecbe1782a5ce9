"""Thinkers of Qwen2.5-Omni and Qwen3-Omni; audio, which no common prompt has, is text."""

from tests.families import Family

AUDIO_ID, AUDIO_START, AUDIO_END = 124, 125, 126
_IDS = {"audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END}
_AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "n_window": 4,
    "output_dim": 64,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = (
    Family(
        name="qwen2_5_omni",
        like="qwen2_5_vl",
        model="Qwen2_5OmniThinker",
        special=_IDS | {"audio_token_index": AUDIO_ID, "audio_config": _AUDIO},
        ids=("image_token_index", "video_token_index"),
        videos=True,
        typed=False,
        seconds="video_second_per_grid",
        needs="5.24",
    ),
    Family(
        name="qwen3_omni_moe",
        like="qwen3_vl",
        model="Qwen3OmniMoeThinker",
        text=lambda layers: _EXPERTS,
        special=_IDS
        | {
            "audio_token_id": AUDIO_ID,
            "audio_config": _AUDIO
            | {"downsample_hidden_size": 8, "n_window": 50, "n_window_infer": 100},
        },
        videos=True,
        typed=False,
        ids=("image_token_id", "video_token_id"),
        seconds="video_second_per_grid",
        needs="5.24",
    ),
)
