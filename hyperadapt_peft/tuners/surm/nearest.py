"""The structured matrix nearest to a dense one, in the Frobenius norm.

Circulant: the mean of each wrapped diagonal. Kronecker: the leading singular pair of the rearranged matrix (Van Loan
and Pitsianis, "Approximation with Kronecker products", 1993). Both are exact minima. A single Toeplitz matrix is the
mean of each diagonal; from there the product of two is improved by gradient descent (L-BFGS).

LDR(r): with D = Z_1 M - M Z_-1 the matrix is M = sum_i Z_1(g_i) Z_-1(h_i) exactly when D = 2 sum_i g_i (J h_i)^T, J
the reversal, so a matrix of displacement rank <= r is read off the SVD of D. Else, Fourier transforms diagonalise Z_1
and Z_-1 and the problem becomes a low-rank approximation with the weights |lambda_i - mu_j|^-2, which alternating least
squares solves one factor at a time: every sweep is exact linear algebra and the error never grows. That, like the
Toeplitz product, is a local minimum, but never worse than the circulant and Toeplitz matrices which LDR(r) contains.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .structures import LDR, Circulant, Kronecker, Structure, Toeplitz
from .structures.convolution import diagonals_to_dense


class Nearest(NamedTuple):
    """What `nearest` found.

    Attributes:
        factors (`tuple[Tensor, Tensor]`): A and B.
        dense (`Tensor`): Their matrix (out, in).
        error (`float`): The Frobenius norm of the difference relative to that of the target; 0 for a zero target.
    """

    factors: tuple[Tensor, Tensor]
    dense: Tensor
    error: float


@torch.no_grad()
def nearest(matrix: Tensor, structure: Structure, steps: int = 200) -> Nearest:
    """Return the nearest matrix of a structure to a dense one, computed in float64.

    Args:
        matrix (`Tensor`): (out, in).
        structure (`Structure`): Of `structures`.
        steps (`int`, defaults to 200):
            The most descent steps where there is no closed form (Toeplitz product, LDR); 0 keeps the starting point.

    Returns:
        `Nearest`: In the dtype of `matrix`, in float32 at least.

    Raises:
        ValueError: If it is not a finite floating point matrix.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"expected a floating point matrix, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("the matrix is not finite")
    target = matrix.detach().double()
    match structure:
        case Circulant():
            a = _circulant(target)
            b = torch.ones_like(a)
        case Toeplitz():
            a, b = _toeplitz_product(target, structure, steps)
        case Kronecker():
            a, b = _kronecker(target)
        case LDR():
            a, b = _ldr(target, structure, steps)
    dense = structure.dense(a, b, *matrix.shape)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return Nearest((a.to(dtype), b.to(dtype)), dense.to(dtype), _error(dense, target))


def _error(dense: Tensor, target: Tensor) -> float:
    norm = target.norm().item()
    return (dense - target).norm().item() / norm if norm else 0.0


def _mean_by(groups: Tensor, target: Tensor) -> Tensor:
    """The mean of the entries of each group."""
    groups = groups.flatten()
    return torch.bincount(groups, weights=target.flatten()) / torch.bincount(groups)


def _offsets(target: Tensor) -> Tensor:
    """i - j of every entry."""
    rows, columns = (torch.arange(size, device=target.device) for size in target.shape)
    return rows[:, None] - columns


def _circulant(target: Tensor) -> Tensor:
    """The first column (max(out, in),) of the nearest circulant matrix."""
    return _mean_by(_offsets(target) % max(target.shape), target)


def _toeplitz(target: Tensor, symmetric: bool) -> Tensor:
    """The nearest single Toeplitz matrix, as the factor B of a product."""
    offsets = _offsets(target)
    return _mean_by(offsets.abs() if symmetric else offsets + target.shape[1] - 1, target)


def _kronecker(target: Tensor) -> tuple[Tensor, Tensor]:
    (p, q), (r, s) = Kronecker().factor_shapes(*target.shape)
    # row (i, k), column (j, l) holds the entry A_ik B_jl of the product, so the product has rank one
    rearranged = target.reshape(p, r, q, s).transpose(1, 2).reshape(p * q, r * s)
    left, values, right = torch.linalg.svd(rearranged, full_matrices=False)
    scale = values[0].sqrt()
    return (scale * left[:, 0]).reshape(p, q), (scale * right[0]).reshape(r, s)


def _descend(
    structure: Structure, factors: tuple[Tensor, Tensor], target: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """L-BFGS on the squared error; the best point seen, the start included."""
    scale = target.norm().item() or 1.0
    identity = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
    trained = [factor.detach().clone().requires_grad_() for factor in factors]
    best, kept = math.inf, factors
    optimizer = torch.optim.LBFGS(
        trained, max_iter=steps, tolerance_grad=1e-14, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        nonlocal best, kept
        optimizer.zero_grad()
        product = structure.matmul(identity, trained[0], trained[1], target.shape[0]).T
        loss = ((product - target) / scale).square().sum()
        loss.backward()
        if loss.item() < best:
            best, kept = loss.item(), (trained[0].detach().clone(), trained[1].detach().clone())
        return loss

    if steps:
        with torch.enable_grad():
            optimizer.step(closure)
    return kept


def _toeplitz_product(target: Tensor, structure: Toeplitz, steps: int) -> tuple[Tensor, Tensor]:
    """Start at the nearest single Toeplitz matrix times the identity."""
    identity = target.new_zeros(structure.factor_shapes(*target.shape)[0])
    identity[0 if structure.symmetric else target.shape[1] - 1] = 1
    return _descend(structure, (identity, _toeplitz(target, structure.symmetric)), target, steps)


def displacement(matrix: Tensor) -> Tensor:
    """Z_1 M - M Z_-1 of a square matrix (n, n), with the shifts Z_f = Z_f((0, 1, 0, ...)); LDR(r) makes it rank r."""
    shifted = torch.cat([matrix[:, 1:], -matrix[:, :1]], dim=1)
    return matrix.roll(1, 0) - shifted


def _generators(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """LDR factors (rank, n) of a square matrix, exact if its displacement rank is at most `rank`."""
    left, values, right = torch.linalg.svd(displacement(matrix) / 2)
    scale = values[:rank].sqrt()
    return (left[:, :rank] * scale).T, (right[:rank].T * scale).T.flip(-1)


def _balance(circulant: Tensor, skew: Tensor) -> tuple[Tensor, Tensor]:
    """The same matrix from orthogonal generators of equal norms: good to train from."""
    (q1, r1), (q2, r2) = torch.linalg.qr(circulant.T), torch.linalg.qr(skew.T)
    left, values, right = torch.linalg.svd(r1 @ r2.T)
    return (q1 @ left * values.sqrt()).T, (q2 @ right.T * values.sqrt()).T


def _ldr(target: Tensor, structure: LDR, steps: int) -> tuple[Tensor, Tensor]:
    out_features, in_features = target.shape
    n = max(out_features, in_features)
    padded = target.new_zeros(n, n)
    padded[:out_features, :in_features] = target
    rank = min(structure.rank, n)  # n terms give every matrix

    # start from the displacement, and from the structured matrix that LDR(r) contains with the rest of the rank on top
    starts = [_generators(padded, rank)]
    if rank == 1:
        unit = torch.zeros_like(padded[:1])
        unit[0, 0] = 1
        starts.append((_circulant(target)[None], unit))
    else:
        diagonals = _toeplitz(target, symmetric=False)
        wide = torch.cat([diagonals.new_zeros(n - in_features), diagonals, diagonals.new_zeros(n - out_features)])
        toeplitz = diagonals_to_dense(wide, n, n)
        (g, h), (more_g, more_h) = _generators(toeplitz, 2), _generators(padded - toeplitz, rank - 2)
        starts.append((torch.cat([g, more_g]), torch.cat([h, more_h])))

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return _error(structure.dense(*factors, out_features, in_features), target)

    candidates = list(starts)
    if steps and min(map(error, starts)) > 1e-12:
        candidates += [_alternate(start, target, steps // 2) for start in starts]
        if out_features != in_features:
            candidates.append(_descend(LDR(rank), min(candidates, key=error), target, steps))
    a, b = _balance(*min(candidates, key=error))
    zeros = target.new_zeros(structure.rank - rank, n)
    return torch.cat([a, zeros]), torch.cat([b, zeros])


def _alternate(
    start: tuple[Tensor, Tensor], target: Tensor, sweeps: int, tolerance: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """Alternating least squares for LDR in Fourier space; the entries outside a rectangular target are free.

    With P the unitary Fourier matrix and Q = P diag(exp(-i pi j / n)), Z_1 = P* diag(lambda) P and
    Z_-1 = Q* diag(mu) Q, so P M Q* = (G H^T) / (lambda_i - mu_j) with G = P g and H = 2 conj(Q) J h.
    """
    out_features, in_features = target.shape
    n = start[0].shape[-1]
    k = torch.arange(n, dtype=target.dtype, device=target.device)
    twist = torch.polar(torch.ones_like(k), -math.pi * k / n)
    eigenvalues = twist.square()[:, None] - (twist.square() * twist[1 % n] if n > 1 else -torch.ones_like(twist))
    weights = eigenvalues.abs() ** -2

    def to_fourier(matrix: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(matrix, dim=0, norm="ortho") * twist.conj(), dim=1, norm="ortho")

    def from_fourier(matrix: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(matrix, dim=1, norm="ortho") * twist, dim=0, norm="ortho").real

    def solve(other: Tensor, goal: Tensor, weights: Tensor) -> Tensor:
        """Every row of one factor by weighted least squares against the other factor (n, r)."""
        r = other.shape[1]
        squares = (other.conj().unsqueeze(2) * other.unsqueeze(1)).flatten(1)
        gram = (weights.to(goal.dtype) @ squares).unflatten(1, (r, r))
        # A ridge of rounding size: equal or zero generators make the system singular.
        trace = gram.diagonal(dim1=1, dim2=2).real.sum(1)[:, None, None] + torch.finfo(weights.dtype).tiny
        gram = gram + 1e-13 * trace * torch.eye(r, dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram, (weights * goal) @ other.conj())

    left = torch.fft.fft(start[0].T, dim=0, norm="ortho")
    right = 2 * torch.fft.ifft(start[1].flip(-1).T * twist.conj()[:, None], dim=0, norm="ortho")
    padded = target.new_zeros(n, n)
    previous = math.inf
    for _ in range(sweeps):
        if (out_features, in_features) != (n, n):  # what is not observed is what the current factors say
            padded = from_fourier((left @ right.T) / eigenvalues)
        padded[:out_features, :in_features] = target
        goal = to_fourier(padded) * eigenvalues
        left = solve(right, goal, weights)
        right = solve(left, goal.T, weights.T)
        error = (weights * (left @ right.T - goal).abs().square()).sum().sqrt().item()
        if previous - error <= tolerance * error:
            break
        previous = error
    circulant = torch.fft.ifft(left, dim=0, norm="ortho").real.T
    skew = (torch.fft.fft(right / 2, dim=0, norm="ortho") * twist[:, None]).real.T.flip(-1)
    return circulant, skew
