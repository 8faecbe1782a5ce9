"""Cost figures that papers print, with what our counter gives for the counts they name.

Section numbers are those of the project's method specifications (`T`: methods usable without
training, `L`: trained methods). Here is every FLOPs and cache cell of their shared sections (T 0.8,
T 1.7, T 1.8), and every figure of a method's own section whose counts a layer are stated. Left out,
because no counts are stated: gamma-MoD, VoCo's TFLOPs, p-MoD
on LLaVA-NeXT, YOPO on Qwen2-VL and InternVL, TransPrune's row for SparseVLM, the FLOPs of the XAI
compressor; and the extra cost of ZOO-Prune, which lies in the projector.
"""

from tests.cost_cells import (
    GB,
    MB,
    MIB,
    QWEN2_7B,
    VICUNA_7B,
    VICUNA_13B,
    Cell,
    cache,
    left,
    share,
    spans,
    tera,
    whole,
)
from vispress.flops import average_tokens
from vispress.methods.divprune import DivPrune
from vispress.methods.fastervlm import FasterVLM
from vispress.methods.fastv import FastV
from vispress.methods.fourier import Fourier
from vispress.methods.pyramiddrop import PyramidDrop
from vispress.methods.sparsevlm import PRESETS as LISTS
from vispress.methods.sparsevlm_plus import PRESETS as LISTS_PLUS
from vispress.methods.transprune import TransPrune
from vispress.methods.visionzip import VisionZip
from vispress.methods.vscan import VScan

HIGH, LOW, PYRAMID = TransPrune(preset="high"), TransPrune(preset="low"), PyramidDrop()
HALF = FastV(keep_ratio=0.5, layer=2)
ADSC = spans((576, 4), (288, 6), (144, 8), (72, 14))
SPARSEVLM = (309, 204, 113)
"""Tokens SparseVLM keeps behind layers 2, 6 and 15, recycled ones included, for "192"."""
SPARSEVLM_64 = (82, 32, 18)


def sparsevlm(counts: tuple[int, int, int], scale: int = 1, full: int = 2) -> list[int]:
    """Full layers first (two by the table, three as coded), then three stages."""
    a, b, c = (scale * count for count in counts)
    return spans((scale * 576, full), (a, 4), (b, 9), (c, 19 - full))


def holitom(per_frame: int) -> list[int]:
    """32 frames, counts a frame rounded up; half of what is left goes before layer 18 of 28."""
    return spans((32 * per_frame, 18), (16 * per_frame, 10))


PMOD = [
    *[576] * 8, 486, 464, 440, 414, 388, 360, 331, 302, 273, 244, 215, 187, 161, 135, 111, 89,
    *[86] * 8,
]  # fmt: skip
PMOD_TEXT = 48
"""The specification says about 50 text tokens, with the LM head counted."""


def with_head(counts, tokens: int) -> float:
    """`flop3` with an LM head of 32000 words over `tokens` positions."""
    return tera(counts, "flop3") + 2 * tokens * VICUNA_7B.width * 32_000 / 1e12


FORMULAS = [
    Cell("T 0.8", "mac3, 7B, 576", tera(whole(576)), 3.82),
    Cell("T 0.8", "mac3, 7B, 2880", tera(whole(2880)), 20.83),
    Cell("T 0.8", "PyramidDrop, 576, %", share(left(PYRAMID, 576), 576), 46.6),
    Cell("T 0.8", "FastV K=2 R=.5, 576, %", share(left(HALF, 576), 576), 52.6),
    *(
        Cell("T 0.8, GlobalCom2 and CDPruner", f"flop3, 7B, {n}", tera(whole(n), "flop3"), printed)
        for n, printed in {
            2880: 41.65, 2160: 30.42, 1440: 19.74, 720: 9.60, 320: 4.20, 288: 3.77,
        }.items()
    ),
    *(
        Cell(
            "T 0.8, GlobalCom2",
            f"flop3, 13B, {n}",
            tera(whole(n, VICUNA_13B), "flop3", VICUNA_13B),
            printed,
        )
        for n, printed in {2880: 79.9, 720: 18.7, 288: 7.38}.items()
    ),
    Cell("T 0.8", "fastv2, 7B, 576", tera(whole(576), "fastv2"), 2.99),
    Cell("T 0.8", "fastv2, Qwen2-7B, 6272", tera(whole(6272, QWEN2_7B), "fastv2", QWEN2_7B), 40.8),
    Cell("T 0.8", "FastV K=2 keeping 192, average", average_tokens(
        left(FastV(num_tokens=192, layer=2), 576)), (2 * 576 + 30 * 192) / 32),
    Cell("T 0.8", "PyramidDrop, average", average_tokens(left(PYRAMID, 576)), 270),
    Cell("T 0.8", "SparseVLM, 2 full layers, average", average_tokens(sparsevlm(SPARSEVLM)), 192.0),
    Cell("T 0.8", "SparseVLM, 3 full layers, average",
         average_tokens(sparsevlm(SPARSEVLM, full=3)), 206.5),
    Cell("T 0.8", "TransPrune-High, average", average_tokens(left(HIGH, 576)), 236.25),
]  # fmt: skip

TABLES = [
    Cell("T 1.7, HoliTom", "vanilla", tera(whole(6272, QWEN2_7B), "fastv2", QWEN2_7B), 40.8),
    Cell("T 1.7, HoliTom", "25 %", tera(holitom(49), "fastv2", QWEN2_7B), 7.1),
    Cell("T 1.7, HoliTom", "10 %", tera(holitom(20), "fastv2", QWEN2_7B), 2.8),
    *(
        Cell(
            "T 1.7, HoliTom",
            f"{per_frame} of 196 a frame, %",
            share(holitom(per_frame), 6272, "fastv2", QWEN2_7B),
            printed,
        )
        for per_frame, printed in {49: 17.4, 40: 14.2, 30: 10.5, 20: 6.9}.items()
    ),
    Cell("T 1.8, CDPruner", "full", tera(whole(2880), "flop3"), 41.7),
    Cell(
        "T 1.8, CDPruner", "FastV, mean of 320",
        tera(left(FastV(mean_keep_ratio=1 / 9, layer=2), 2880), "flop3"), 4.4,
    ),
    Cell(  # the counts for 64 of 576, five times
        "T 1.8, CDPruner", "SparseVLM, 320", tera(sparsevlm(SPARSEVLM_64, 5), "flop3"), 4.5
    ),
    Cell(
        "T 1.8, CDPruner", "VisionZip, 320",
        tera(left(VisionZip(num_tokens=320), 2880), "flop3"), 4.2,
    ),
    Cell(
        "T 1.8, CDPruner", "DivPrune, 320",
        tera(left(DivPrune(num_tokens=320), 2880), "flop3"), 4.2,
    ),
    Cell("T 1.8, CDPruner", "CDPruner, 320", tera(whole(320), "flop3"), 4.2),
    Cell("T 1.8, CDPruner", "KV, full, MiB", cache(whole(2880), MIB), 1440),
    Cell("T 1.8, CDPruner", "KV, 320, MiB", cache(whole(320), MIB), 160),
]  # fmt: skip

METHODS = [
    *(  # 143 text tokens: the one count that fits all four figures
        Cell(
            "T 2.1, FasterVLM on LLaVA-NeXT",
            f"{n} visual tokens",
            tera(left(FasterVLM(num_tokens=n), 2880, text=143), "flop3"),
            printed,
        )
        for n, printed in {2880: 43.58, 720: 11.51, 290: 5.71, 145: 3.80}.items()
    ),
    Cell("T 2.3, TransPrune", "High", tera(left(HIGH, 576)), 1.56),
    Cell("T 2.3, TransPrune", "High, %", share(left(HIGH, 576), 576), 40.8),
    Cell("T 2.3, TransPrune", "High, NeXT", tera(left(HIGH, 2880)), 8.33),
    Cell("T 2.3, TransPrune", "High, NeXT, %", share(left(HIGH, 2880), 2880), 40.0),
    Cell("T 2.3, TransPrune", "Low", tera(left(LOW, 576)), 1.19),
    Cell("T 2.3, TransPrune", "Low, %", share(left(LOW, 576), 576), 31.2),
    Cell("T 2.3, TransPrune", "Low, NeXT", tera(left(LOW, 2880)), 6.41),
    Cell("T 2.3, TransPrune", "Low, NeXT, %", share(left(LOW, 2880), 2880), 30.8),
    Cell("T 2.3, TransPrune", "Video-LLaVA, full", tera(whole(2048)), 14.4),
    Cell(  # the same layers 7, 9 and 12 of 28; few tokens, so that FLOPs follow the counts
        "T 2.3, TransPrune", "High on Qwen2.5-VL-7B, average %",
        average_tokens(left(TransPrune(layers=(7, 9, 12)), 1296, QWEN2_7B)) / 12.96, 45.1,
    ),
    *(
        Cell("T 2.8, GlobalCom2", f"NeXT-7B, {n}", tera(whole(n), "flop3"), printed)
        for n, printed in {2880: 41.7, 2160: 30.4, 1440: 19.7, 720: 9.6, 288: 3.8}.items()
    ),
    *(
        Cell(
            "T 2.8, GlobalCom2",
            f"NeXT-13B, {n}",
            tera(whole(n, VICUNA_13B), "flop3", VICUNA_13B),
            printed,
        )
        for n, printed in {2880: 80.0, 720: 18.7, 288: 7.4}.items()
    ),
    Cell("T 2.8, GlobalCom2", "KV, 720, MB", cache(whole(720), MB), 377),
    Cell("T 2.8, GlobalCom2", "KV, 288, MB", cache(whole(288), MB), 151),
    Cell(
        "T 2.10, LVLM_CSP", "token-layers, %",
        average_tokens(spans((72, 8), (576, 8), (72, 16))) / 5.76, 34.4,
    ),
    Cell("T 2.15, CATP", "5 images of 576", tera(whole(5 * 576)), 20.84),
    Cell("T 2.16 and L 1, ADSC", "average", average_tokens(ADSC), 193.5),
    Cell(
        "T 2.16 and L 1, ADSC", "KV cut with 99 text tokens, %",
        100 - 100 * average_tokens([n + 99 for n in ADSC]) / (576 + 99), 56.7,
    ),
    Cell("L 1, ADSC", "LLM FLOPs cut with 99 text tokens, %", 100
         - share([n + 99 for n in ADSC], 576 + 99), 57.2),
    Cell("L 1, ADSC", "average for 128", average_tokens(
        spans((576, 2), (288, 3), (144, 4), (72, 23))), 132.75),
    Cell("L 1, ADSC", "average for 64", average_tokens(
        spans((576, 1), (288, 1), (144, 1), (72, 3), (36, 26))), 67.5),
    *(
        Cell("T 3.3, SparseVLM", f"2 full layers, average for {n}",
             average_tokens(sparsevlm(LISTS[n])), n)
        for n in (128, 96)
    ),
    *(
        Cell("T 3.3, SparseVLM+", f"2 full layers, average for {n}",
             average_tokens(sparsevlm(counts)), n)
        for n, counts in LISTS_PLUS.items()
    ),
    Cell("T 3.4, PyramidDrop on LLaVA-NeXT", "FLOPs cut, %", 100 - share(left(PYRAMID, 2880), 2880),
         55),
    Cell("T 3.9 and L 7, DART K=2, R=.75", "KV on Qwen2-VL, % of full", 100
         * average_tokens(spans((1000, 2), (250, 26))) / 1000, 100 * 21.6 / 71.2),
    Cell("L 7, XAI compressor", "KV at 25 %, % of full", 100 * cache(
        whole(250, QWEN2_7B), 1, QWEN2_7B) / cache(whole(1000, QWEN2_7B), 1, QWEN2_7B),
        100 * 17.8 / 71.2),
    Cell("T 3.12, VisPruner", "KV, full, MiB", cache(whole(2880), MIB), 1440),
    Cell("T 3.12, VisPruner", "full, 143 text tokens", tera(whole(2880, text=143), "flop3"), 43.6),
    Cell("T 3.16, FastVID", "19 of 196 a frame, %", share(
        whole(32 * 19, QWEN2_7B), 6272, "mac3", QWEN2_7B), 8.3),
    Cell("L cost accounting", "flop3, 7B, 576", tera(whole(576), "flop3"), 7.634),
    Cell("L cost accounting", "flop3, 13B, 576", tera(whole(576, VICUNA_13B), "flop3", VICUNA_13B),
         14.888),
    Cell("L 8, YOPO", "7B", tera(whole(576), "flop3"), 7.63),
    Cell("L 8, YOPO", "13B", tera(whole(576, VICUNA_13B), "flop3", VICUNA_13B), 14.89),
    Cell("L 8, YOPO", "7B, half of a half", tera(spans((576, 16)), "flop3") / 2, 1.91),
    Cell("L 8, YOPO", "13B, half of a half", tera(spans((576, 20)), "flop3", VICUNA_13B) / 2, 3.72),
    Cell("L 2, p-MoD", "KV, %", average_tokens(PMOD) / 5.76, 53.8),
    Cell("L 2, p-MoD", "mean ratio", average_tokens(PMOD) / 576, 0.5375),
    Cell("L 2, p-MoD", "dense", with_head(whole(576, text=PMOD_TEXT), 576 + PMOD_TEXT), 8.38),
    Cell("L 2, p-MoD", "routed", with_head([n + PMOD_TEXT for n in PMOD], 576 + PMOD_TEXT), 4.92),
    Cell("L 4, VoCo", "KV, 576, MB", cache(whole(576), MB), 302.4),
    Cell("L 4, VoCo", "KV, 1, MB", cache(whole(1), MB), 0.525),
]  # fmt: skip

MATCHING = [*FORMULAS, *TABLES, *METHODS]

NOMINAL = "lists are named by round numbers"
OF_VIDEO = (
    "counts depend on the video, and whether tokens are those before or behind layer 10 is open"
)

DIFFERENT = [
    Cell("T 2.10, LVLM_CSP", "FLOPs cut, %",
         100 - share(spans((72, 8), (576, 8), (72, 16)), 576), 65,
         "the stages are a reconstruction of the abstract's figure"),
    Cell("T 3.3, SparseVLM", "2 full layers, average for 64",
         average_tokens(sparsevlm(LISTS[64])), 64, NOMINAL),
    Cell("T 3.10, VScan on LLaVA-NeXT", "mean of 320, FLOPs of full over its own",
         100 / share(left(VScan(keep_ratio=1 / 9), 2880), 2880), 10,
         "budget and convention are not stated, and 10 is rounded; 10.1 in fastv2"),
    Cell("T 3.14, DyCoke", "3098 of 6272, 0.3 of them behind layer 3, %",
         100 * 0.3 * 3098 / 6272, 14.25, "how frames without a pair were counted is not stated"),
    Cell("T 3.15, PruneVid", "PLLaVA, 16.2 % of 2304 in every layer, %",
         share(whole(373), 2304, "fastv2"), 23, OF_VIDEO),
    Cell("T 3.15, PruneVid", "LLaVA-OneVision, 17.0 % of 6272 in every layer, %",
         share(whole(1066, QWEN2_7B), 6272, "fastv2", QWEN2_7B), 20, OF_VIDEO),
    Cell("T 1.8, CDPruner", "PyramidDrop, mean of 320",
         tera(left(PyramidDrop(mean_keep_ratio=1 / 9, layers=(2, 8, 16)), 2880), "flop3"), 4.5,
         "comparisons shift layers and ratios and do not say how; 4.3 to 4.6 are possible"),
    Cell("L 1, ADSC", "FLOPs cut, %", 100 - share([n + 99 for n in ADSC], 675), 53.7,
         "a fixed part (vision encoder, projector, head) was counted"),
    Cell("L 8, YOPO", "7B, half of a quarter", tera(spans((576, 16)), "flop3") / 4, 0.92,
         "the decomposition is a reconstruction; heads, neurons and windows are cut, not tokens"),
    Cell("L 8, YOPO", "13B, half of a quarter",
         tera(spans((576, 20)), "flop3", VICUNA_13B) / 4, 1.79,
         "the decomposition is a reconstruction; heads, neurons and windows are cut, not tokens"),
    Cell("T 2.5, Fourier", "FLOPs cut at 144 tokens, %",
         100 - share(left(Fourier(num_tokens=144), 576), 576), 83.8,
         "abstract only, budget not stated; none of 256, 144, 64 and 36 gives it"),
    Cell("T 2.3, TransPrune", "behind VisionZip, 288 to 36", tera(left(HIGH, 288)), 0.66,
         "the ratios used behind VisionZip are not stated"),
    Cell("T 2.3, TransPrune", "High on Video-LLaVA", tera(left(HIGH, 2048)), 6.1,
         "the counts on Video-LLaVA are not stated"),
    Cell("T 2.8, GlobalCom2", "KV, 2880, MB", cache(whole(2880), MB), 1536,
         "tables count 2880 tokens without unpad and newlines; 2928 with 48 newlines fit"),
    Cell("T 2.15, CATP", "351 of 576 until layer 7, then 128",
         tera(spans((5 * 351, 7), (5 * 128, 25))), 4.38,
         "4.38 T is near 640 tokens in every layer: the earlier stage seems not to be counted"),
    Cell("T 2.15, CATP", "KV, 5 images of 576, GB", cache(whole(5 * 576), GB), 1.12,
         "a fp16 cache of 2880 tokens is larger"),
    Cell("T 3.1, FastV", "K=3 R=.5, %",
         share(left(FastV(keep_ratio=0.5, layer=3), 576), 576, "fastv2"), 57,
         "counted on a whole prompt, whose length is not stated"),
    Cell("T 3.1, FastV", "K=2 R=.5, cut, %", 100 - share(left(HALF, 576), 576, "fastv2"), 45,
         "counted on a whole prompt, whose length is not stated"),
    Cell("T 3.12, VisPruner", "640", tera(whole(640, text=143), "flop3"), 11.5,
         "the figure of 720 tokens in FasterVLM's table"),
    Cell("T 3.12, VisPruner", "160", tera(whole(160, text=143), "flop3"), 3.8,
         "the figure of 145 tokens in FasterVLM's table"),
    Cell("T 3.12, VisPruner", "FastV K=2 keeping 640",
         tera(left(FastV(num_tokens=640, layer=2), 2880, text=143), "flop3"), 13.5,
         "720 tokens give 13.6"),
    Cell("T 3.12, VisPruner", "FastV K=2 keeping 160",
         tera(left(FastV(num_tokens=160, layer=2), 2880, text=143), "flop3"), 6.3,
         "145 tokens give 6.28"),
    Cell("T 3.14, DyCoke", "3098 of 6272 tokens, %",
         share(whole(3098, QWEN2_7B), 6272, "fastv2", QWEN2_7B), 43,
         "the printed 14.25 % retained is not the counts' 14.8 % either"),
    Cell("L 7, FastV K=2, R=.75", "KV on Qwen2-VL, % of full",
         100 * average_tokens(left(FastV(keep_ratio=0.25, layer=2), 1000, QWEN2_7B)) / 1000,
         100 * 19.7 / 71.2, "the layer is not stated; K=1 gives 27.7"),
]  # fmt: skip
