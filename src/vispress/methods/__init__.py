"""The built-in methods; importing this package registers them. One import line a method."""

from vispress.methods.avg_pool import AvgPool as AvgPool
from vispress.methods.cdpruner import CDPruner as CDPruner
from vispress.methods.dart import DART as DART
from vispress.methods.divprune import DivPrune as DivPrune
from vispress.methods.evs import EVS as EVS
from vispress.methods.fastervlm import FasterVLM as FasterVLM
from vispress.methods.fastv import FastV as FastV
from vispress.methods.flashvlm import FlashVLM as FlashVLM
from vispress.methods.fourier import Fourier as Fourier
from vispress.methods.globalcom2 import GlobalCom2 as GlobalCom2
from vispress.methods.holov import HoloV as HoloV
from vispress.methods.max_norm import MaxNorm as MaxNorm
from vispress.methods.no_image import NoImage as NoImage
from vispress.methods.prumerge import PruMerge as PruMerge
from vispress.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vispress.methods.random_ import Random as Random
from vispress.methods.sparsevlm import SparseVLM as SparseVLM
from vispress.methods.tome import ToMe as ToMe
from vispress.methods.transprune import TransPrune as TransPrune
from vispress.methods.uniform import Uniform as Uniform
from vispress.methods.visionzip import VisionZip as VisionZip
from vispress.methods.vispruner import VisPruner as VisPruner
from vispress.methods.vscan import VScan as VScan
from vispress.methods.vtc_cls import VTCCLS as VTCCLS
from vispress.methods.vtw import VTW as VTW
from vispress.methods.zoo_prune import ZOOPrune as ZOOPrune
