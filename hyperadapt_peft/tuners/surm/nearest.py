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
from tqdm import tqdm

from hyperadapt_peft.tuners.surm.structures import (
    circulant_dense,
    factor_shapes,
    kronecker_dense,
    ldr_dense,
    ldr_matmul,
    toeplitz_dense,
    toeplitz_matmul,
)


class Nearest(NamedTuple):
    """factors: as `factor_shapes` and the functions of `structures` order them; dense: their matrix (out, in);
    error: the Frobenius norm of the difference relative to that of the target (0 for a zero target)."""

    factors: tuple[Tensor, Tensor]
    dense: Tensor
    error: float


def nearest(
    matrix: Tensor, structure: str, *, rank: int = 1, symmetric: bool = True, steps: int = 200, progress: bool = False
) -> Nearest:
    """The nearest matrix of a structure to `matrix` (out, in), in float32 or wider; computed in float64.

    Args:
        rank: the r of LDR(r).
        symmetric: for Toeplitz, whether both factors are.
        steps: the most descent steps where there is no closed form (Toeplitz product, LDR); 0 keeps the starting point.
        progress: show a bar for them.

    Raises:
        ValueError: not a finite floating point matrix, or an unknown structure.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"expected a floating point matrix, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("the matrix is not finite")
    out_features, in_features = matrix.shape
    factor_shapes(structure, out_features, in_features, rank=rank)  # refuses unknown structures and sizes
    with torch.no_grad():
        target = matrix.detach().double()
        bar = tqdm(total=steps, desc=f"nearest {structure}", disable=not progress)
        if structure == "circulant":
            column = _circulant(target)
            first, second = column, torch.ones_like(column)
            dense = circulant_dense(first, second, out_features, in_features)
        elif structure == "toeplitz":
            first, second = _toeplitz_product(target, symmetric, steps, bar)
            dense = toeplitz_dense(first, second, out_features, in_features, symmetric)
        elif structure == "kronecker":
            first, second = _kronecker(target)
            dense = kronecker_dense(first, second, out_features, in_features)
        else:
            first, second = _ldr(target, rank, steps, bar)
            dense = ldr_dense(first, second, out_features, in_features)
        bar.close()
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        return Nearest((first.to(dtype), second.to(dtype)), dense.to(dtype), _error(dense, target))


def _error(dense: Tensor, target: Tensor) -> float:
    norm = target.norm().item()
    return (dense - target).norm().item() / norm if norm else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms
# ---------------------------------------------------------------------------------------------------------------------


def _mean_by(groups: Tensor, target: Tensor, count: int) -> Tensor:
    """The mean of the entries of each group (count,)."""
    sums = torch.zeros(count, dtype=target.dtype, device=target.device).index_add_(
        0, groups.flatten(), target.flatten()
    )
    return sums / torch.bincount(groups.flatten(), minlength=count)


def _offsets(target: Tensor) -> Tensor:
    """i - j of every entry."""
    rows, columns = (torch.arange(size, device=target.device) for size in target.shape)
    return rows[:, None] - columns


def _circulant(target: Tensor) -> Tensor:
    """The first column (max(out, in),) of the nearest circulant matrix."""
    n = max(target.shape)
    return _mean_by(_offsets(target) % n, target, n)


def _toeplitz(target: Tensor, symmetric: bool) -> Tensor:
    """The nearest single Toeplitz matrix, as the `outer` factor of `toeplitz_dense`."""
    out_features, in_features = target.shape
    if symmetric:
        return _mean_by(_offsets(target).abs(), target, max(out_features, in_features))
    return _mean_by(_offsets(target) + in_features - 1, target, out_features + in_features - 1)


def _kronecker(target: Tensor) -> tuple[Tensor, Tensor]:
    (a, c), (b, d) = factor_shapes("kronecker", *target.shape)
    # Row (i, k), column (j, l) holds the entry A_ik B_jl of the product, so the product has rank one.
    rearranged = target.reshape(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)
    left, values, right = torch.linalg.svd(rearranged, full_matrices=False)
    scale = values[0].sqrt()
    return (scale * left[:, 0]).reshape(a, c), (scale * right[0]).reshape(b, d)


# ---------------------------------------------------------------------------------------------------------------------
# Descent
# ---------------------------------------------------------------------------------------------------------------------


def _descend(product, factors: tuple[Tensor, Tensor], target: Tensor, steps: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """L-BFGS on ||product(factors) - target||^2; the best point seen, the start included."""
    scale = target.norm().item() or 1.0
    trained = [factor.detach().clone().requires_grad_() for factor in factors]
    best, kept = math.inf, factors
    optimizer = torch.optim.LBFGS(
        trained, max_iter=steps, tolerance_grad=1e-14, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        nonlocal best, kept
        optimizer.zero_grad()
        loss = ((product(*trained) - target) / scale).square().sum()
        loss.backward()
        if loss.item() < best:
            best, kept = loss.item(), (trained[0].detach().clone(), trained[1].detach().clone())
        bar.update()
        return loss

    if steps:
        with torch.enable_grad():
            optimizer.step(closure)
    return kept


def _toeplitz_product(target: Tensor, symmetric: bool, steps: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Start at identity times the nearest single Toeplitz matrix."""
    out_features, in_features = target.shape
    inner = target.new_zeros(factor_shapes("toeplitz", out_features, in_features, symmetric=symmetric)[0])
    inner[0 if symmetric else in_features - 1] = 1
    identity = torch.eye(in_features, dtype=target.dtype, device=target.device)

    def product(inner: Tensor, outer: Tensor) -> Tensor:
        return toeplitz_matmul(identity, inner, outer, out_features, symmetric).T

    return _descend(product, (inner, _toeplitz(target, symmetric)), target, steps, bar)


# ---------------------------------------------------------------------------------------------------------------------
# LDR
# ---------------------------------------------------------------------------------------------------------------------


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
    """The same matrix from orthogonal generators of equal norms: a good place to train from."""
    (q1, r1), (q2, r2) = torch.linalg.qr(circulant.T), torch.linalg.qr(skew.T)
    left, values, right = torch.linalg.svd(r1 @ r2.T)
    return (q1 @ left * values.sqrt()).T, (q2 @ right.T * values.sqrt()).T


def _ldr(target: Tensor, rank: int, steps: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    out_features, in_features = target.shape
    n = max(out_features, in_features)
    padded = target.new_zeros(n, n)
    padded[:out_features, :in_features] = target
    rank_used = min(rank, n)  # n terms give every matrix

    # Start from the displacement, and from the structured matrix LDR(r) contains with the rest of the rank on top.
    unit = torch.zeros(n, dtype=target.dtype, device=target.device)
    unit[0] = 1
    contained = _circulant(target)[None], unit[None]
    starts = [_generators(padded, rank_used)]
    if rank_used > 1:
        diagonals = _toeplitz(target, symmetric=False)
        wide = torch.cat([diagonals.new_zeros(n - in_features), diagonals, diagonals.new_zeros(n - out_features)])
        single = torch.zeros(2 * n - 1, dtype=target.dtype, device=target.device)
        single[n - 1] = 1
        toeplitz = toeplitz_dense(single, wide, n, n, symmetric=False)
        (g, h), (more_g, more_h) = _generators(toeplitz, 2), _generators(padded - toeplitz, rank_used - 2)
        contained = torch.cat([g, more_g]), torch.cat([h, more_h])
    starts.append(contained)

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return _error(ldr_dense(*factors, out_features, in_features), target)

    candidates = list(starts)
    if steps and min(map(error, starts)) > 1e-12:
        candidates += [_alternate(start, target, steps // 2, bar) for start in starts]
        if out_features != in_features:
            identity = torch.eye(in_features, dtype=target.dtype, device=target.device)
            best = min(candidates, key=error)
            candidates.append(
                _descend(lambda g, h: ldr_matmul(identity, g, h, out_features).T, best, target, steps, bar)
            )
    first, second = _balance(*min(candidates, key=error))
    zeros = target.new_zeros(rank - rank_used, n)
    return torch.cat([first, zeros]), torch.cat([second, zeros])


def _alternate(
    start: tuple[Tensor, Tensor], target: Tensor, sweeps: int, bar: tqdm, tolerance: float = 1e-7
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
        bar.update()
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
