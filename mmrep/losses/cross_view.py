"""How two readings stand to the same keys: the similarities of one as probabilities, which the other is to have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_view(
    reference: Tensor, student: Tensor, keys: Tensor, *, reference_temperature: float, temperature: float
) -> Tensor:
    """``KL(softmax_k(r_i . q_k / reference_temperature) | softmax_k(s_i . p_k / temperature))`` of every row i.

    With unit vectors, equations 1 to 4 of SCT (Limkonchotiwat et al. 2023, arXiv:2311.03228). The entropy of the first
    distribution, by which this differs from the cross-entropy of the paper, is constant: 0 is agreement.

    Args:
        reference: [n, E], what another view says, a constant.
        student: [n, E].
        keys: [m, E], constants, m at least 1.
        reference_temperature: of the first distribution, above 0; lower than the other sharpens.
        temperature: of the second, above 0.

    Returns:
        [n], float32 (or float64 where the student is).

    Raises:
        ValueError: the three do not fit.
    """
    if reference.shape != student.shape or keys.ndim != 2 or keys.shape[1:] != student.shape[1:] or not len(keys):
        raise ValueError(
            f"reference and student are [n, E] and keys [m, E], m > 0; got {tuple(reference.shape)}, "
            f"{tuple(student.shape)} and {tuple(keys.shape)}"
        )
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        reference, student, keys = (F.normalize(x.to(dtype), dim=1) for x in (reference, student, keys))
        wanted = (reference.detach() @ keys.detach().T / reference_temperature).log_softmax(1)
        found = (student @ keys.detach().T / temperature).log_softmax(1)
        return (wanted.exp() * (wanted - found)).sum(1)
