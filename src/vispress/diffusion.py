"""Prune visual tokens late in masked-diffusion decoding: public path of `decoding.diffusion`."""

from vispress.decoding.diffusion import Denoised as Denoised
from vispress.decoding.diffusion import Denoiser as Denoiser
from vispress.decoding.diffusion import Embed as Embed
from vispress.decoding.diffusion import LateSteps as LateSteps
from vispress.decoding.diffusion import denoise as denoise
