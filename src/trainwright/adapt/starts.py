"""Adapters that begin as a part of the base, so that base and adapter together are the original at the start.

    pissa           the base's largest singular values (Meng et al. 2024), which leave the base
    pissa_niter_N   the same by a randomized SVD with N power iterations (Halko et al. 2011, algorithm 4.4)
    olora           the first columns of the base's QR decomposition (Büyükakyüz 2024), which leave the base
    loftq           the best low-rank copy of what rounding the base lost (Li et al. 2023, one iteration)

Owns that arithmetic. What is left of the base is then stored in its own format: PiSSA beside nf4 is the paper's QPiSSA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.model.init import normal

_OVERSAMPLING = 8
"""Columns more than the rank that a randomized SVD looks at (Halko et al. 2011, section 4.2)."""


@torch.no_grad()
def first_factors(init: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A [..., rank, in], B [..., out, rank]) of a weight [..., out, in], experts one by one; all float32.

    scale B A is what the adapter takes over of `weight`; A and B share the singular values evenly, as PEFT's do.
    """
    if weight.dim() == 3:
        pairs = [first_factors(init, expert, rank, scale) for expert in weight]
        a, b = (torch.stack(part) for part in zip(*pairs, strict=True))
        return a, b
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    _, randomized, niter = init.partition("_niter_")
    u, s, vh = _randomized_svd(weight, rank, int(niter)) if randomized else torch.linalg.svd(weight, False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _randomized_svd(weight: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and a few more. The random numbers are always the same: so is every rank's result."""
    columns = min(rank + _OVERSAMPLING, *weight.shape)
    q = torch.linalg.qr(weight @ normal((weight.shape[1], columns), 1.0, "randomized SVD", weight.device)).Q
    for _ in range(niter):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.t() @ weight, False)
    return q @ u, s, vh
