"""Losses: tensors in, scalar out, float32 inside; usable without the rest of the library."""

from mmrep.losses.infonce import InfoNCE, info_nce
from mmrep.losses.siglip import SigLIP, siglip

__all__ = ["InfoNCE", "SigLIP", "info_nce", "siglip"]
