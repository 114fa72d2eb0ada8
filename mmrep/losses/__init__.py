"""Losses: tensors in, scalar out, float32 inside; usable without the rest of the library."""

from mmrep.losses.barlow import BarlowTwins
from mmrep.losses.centroid import Centroid, centroid
from mmrep.losses.cross_correlation import cross_correlation_loss
from mmrep.losses.gram import GRAM, gram
from mmrep.losses.infonce import InfoNCE, info_nce
from mmrep.losses.koleo import KoLeo
from mmrep.losses.siglip import SigLIP, siglip
from mmrep.losses.sigreg import SIGReg
from mmrep.losses.sinkhorn import sinkhorn
from mmrep.losses.symile import Symile, symile
from mmrep.losses.triangle import Triangle, triangle
from mmrep.losses.vicreg import VICReg

__all__ = [
    "GRAM",
    "BarlowTwins",
    "Centroid",
    "InfoNCE",
    "KoLeo",
    "SIGReg",
    "SigLIP",
    "Symile",
    "Triangle",
    "VICReg",
    "centroid",
    "cross_correlation_loss",
    "gram",
    "info_nce",
    "siglip",
    "sinkhorn",
    "symile",
    "triangle",
]
