"""Contrast decoding with outlier tokens: an earlier path of `vispress.decoding.damro`."""

from vispress.decoding.damro import DAMRO as DAMRO
from vispress.decoding.damro import contrast as contrast
