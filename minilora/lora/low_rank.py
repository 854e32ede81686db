"""Low-rank factors and singular value decompositions of products."""

import torch
from torch import Tensor


def low_rank(M: Tensor, r: int, s: float, niter: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) with s B A the best approximation of M (out, in): B = U √(σ/s), A = √(σ/s) Vᵀ.

    niter: find it in a random r-dimensional range that so many iterations turned towards it (Halko et al. 2011,
    algorithm 4.4): quicker, and nearly the best.
    """
    if niter is None:
        U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        start = torch.randn(M.shape[1], r, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        Q = torch.linalg.qr(M @ start.to(M)).Q  # (out, r)
        for _ in range(niter):
            Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
        U, sigma, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
        U = Q @ U
    root = (sigma[:r] / abs(s)).sqrt()  # (r,)
    B, A = U[:, :r] * root.copysign(torch.tensor(s)), root[:, None] * Vh[:r]
    return B.contiguous(), A.contiguous()  # not in LAPACK's order, which an optimiser's saved state would not follow


Spaces = tuple[Tensor, Tensor, Tensor]  # Q_B U (out, k), σ (k,), Q_A V (in, k); k is the rank


def product_svd(B: Tensor, A: Tensor) -> Spaces:
    """U (out, r), σ (r,) and V (in, r) of B A, fp64, without making it: of B (out, r) and A (r, in)."""
    Q_B, R_B = torch.linalg.qr(B.double())  # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, and only the middle is (r, r)
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    return Q_B @ U, sigma, Q_A @ Vh.T
