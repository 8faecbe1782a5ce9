"""Fourier-VLM's compressor against the released functions."""

import math

from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import Fourier
from vispress.methods._parts.geometry.grids import small_grid
from vispress_kernels.dct_lowpass import dct_lowpass


@each_case("fourier")
def test_low_frequencies_are_those_of_the_official_code(case):
    x, official = case["in/features"], case["out/tokens"]
    size = (case["param/grid_h"], case["param/grid_w"])
    small = (case["param/reserve_h"], case["param/reserve_w"])
    ours = dct_lowpass(x, size, small, rescale=False, backend="torch")
    if case["param/norm"] == "none":  # by what sums of other lengths are larger
        ours = ours * math.sqrt(math.prod(size) / math.prod(small))
    close(ours, official)
    close(ours.half().float(), case["out/tokens_f16_path"].float(), rtol=1e-3, atol=1e-3)
    if case["param/norm"] == "ortho" and small != size:
        count = math.prod(small)
        if small_grid(*size, count) == small:
            method = Fourier(values="features", rescale=False)
            plan = method.plan(only(features=x, grid=(1, *size)), count)
            close(plan.features, official)
