"""Singular value decompositions for low-rank factors: of a matrix, and of a product of factors."""

import torch
from torch import Tensor

Spaces = tuple[Tensor, Tensor, Tensor]  # U (out, k), σ (k,), V (in, k); k is the rank


def low_rank(
    M: Tensor, r: int, s: float, niter: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return B and A such that s B A is the best approximation of M with rank r.

    M = U diag(σ) Vᵀ,   B = U √(σ/s),   A = √(σ/s) Vᵀ, each cut to the r largest singular values.

    Args:
        M: The matrix, (out, in).
        r: Rank of the approximation.
        s: Factor of the product B A. With a negative s the sign is in B.
        niter: None decomposes M exactly. A number uses a random range of r dimensions and improves
            it in so many iterations, which is faster and nearly as good.
        seed: Seed of the random range.

    Returns:
        B (out, r) and A (r, in).

    Source:
        Halko et al. 2011, algorithm 4.4, for `niter`.
    """
    if niter is None:
        U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        U, sigma, Vh = _svd_in_random_range(M, r, niter, seed)
    root = (sigma[:r] / abs(s)).sqrt()  # (r,)
    B = U[:, :r] * root.copysign(torch.tensor(s, dtype=root.dtype))  # (out, r)
    A = root[:, None] * Vh[:r]  # (r, in)
    # LAPACK returns transposed memory, which the saved state of an optimiser would not reproduce.
    return B.contiguous(), A.contiguous()


def _svd_in_random_range(M: Tensor, r: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), σ (r,) and Vᵀ (r, in) of M projected to an r-dimensional range."""
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(
        M.shape[1], r, dtype=torch.float32, generator=generator, device="cpu"
    )  # (in, r)
    Q = torch.linalg.qr(M @ start.to(M)).Q  # (out, r)
    for _ in range(niter):
        Q_in = torch.linalg.qr(M.T @ Q).Q  # (in, r)
        Q = torch.linalg.qr(M @ Q_in).Q  # (out, r)
    U, sigma, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)  # (r, r), (r,), (r, in)
    return Q @ U, sigma, Vh


def product_svd(B: Tensor, A: Tensor) -> Spaces:
    """Return the singular value decomposition of B A in fp64, without computing the product.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ with two QR decompositions, and only the middle (r, r) is decomposed.

    Args:
        B: Left factor, (out, r).
        A: Right factor, (r, in).

    Returns:
        U (out, k), σ (k,) and V (in, k), with k = min(r, out, in).
    """
    Q_B, R_B = torch.linalg.qr(B.double())  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(A.double().T)  # (in, r), (r, r)
    middle = R_B @ R_A.T  # (min(r, out), min(r, in))
    U, sigma, Vh = torch.linalg.svd(middle, full_matrices=False)  # Vh: (k, min(r, in))
    return Q_B @ U, sigma, Q_A @ Vh.T
