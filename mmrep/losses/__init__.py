"""Losses: tensors in, scalar out, float32 inside; usable without the rest of the library."""

from mmrep.losses.centroid import Centroid, centroid
from mmrep.losses.cross_correlation import cross_correlation_loss
from mmrep.losses.gram import GRAM, gram
from mmrep.losses.infonce import InfoNCE, info_nce
from mmrep.losses.siglip import SigLIP, siglip
from mmrep.losses.symile import Symile, symile
from mmrep.losses.triangle import Triangle, triangle

__all__ = [
    "GRAM",
    "Centroid",
    "InfoNCE",
    "SigLIP",
    "Symile",
    "Triangle",
    "centroid",
    "cross_correlation_loss",
    "gram",
    "info_nce",
    "siglip",
    "symile",
    "triangle",
]
