"""Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .structure import Shape, Structure


@dataclass(frozen=True)
class Kronecker(Structure):
    """`A (x) B`, with A (p, q) and B (out / p, in / q) of the fewest parameters."""

    factor_dims = 2
    dense_up_to = math.inf  # there is no FFT

    def factor_shapes(self, out_features: int, in_features: int) -> tuple[Shape, Shape]:
        return _factor_shapes(out_features, in_features)

    def dense(self, a: Tensor, b: Tensor, out_features: int, in_features: int) -> Tensor:
        products = a[..., :, None, :, None] * b[..., None, :, None, :]
        return products.flatten(-4, -3).flatten(-2)

    def dtype_of(self, x: Tensor, a: Tensor) -> torch.dtype:
        """bfloat16 stays, as in the base layer: there are only products of matrices, and its range is float32's."""
        return x.dtype if x.dtype == torch.bfloat16 else super().dtype_of(x, a)

    def dense_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        """x as a matrix X (q, in / q) goes to A X B^T; the cheaper side goes first."""
        (p, q), (r, s) = a.shape[-2:], b.shape[-2:]
        x = x.unflatten(-1, (q, s))
        if s * (q + r) * p <= q * (s + p) * r:
            y = _times(_times(x.transpose(-2, -1), a).transpose(-2, -1), b)
        else:
            y = _times(_times(x, b).transpose(-2, -1), a).transpose(-2, -1)
        return y.flatten(-2)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """((batch,) tokens, m, n) times the transpose of ((batch,) k, n): ((batch,) tokens, m, k)."""
    return (x.flatten(-3, -2) @ matrix.transpose(-2, -1)).unflatten(-2, (-1, x.shape[-2]))


@cache
def _factor_shapes(out_features: int, in_features: int) -> tuple[Shape, Shape]:
    """The shapes of the fewest parameters.

    Ties go to the highest attainable rank, min(p, q) * min(out / p, in / q): a row times a column (1 x n) (x) (n x 1)
    has as few parameters as (24 x 32) (x) (32 x 24), but rank one. A last tie goes to the smaller p.
    """

    def cost(p: int, q: int) -> tuple[int, int, int]:
        r, s = out_features // p, in_features // q
        return p * q + r * s, -min(p, q) * min(r, s), p

    p, q = min(((p, q) for p in _divisors(out_features) for q in _divisors(in_features)), key=lambda pq: cost(*pq))
    return (p, q), (out_features // p, in_features // q)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
