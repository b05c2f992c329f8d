"""Matrices of low displacement rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .convolution import convolve, wrapped
from .structure import Shape, Structure


@dataclass(frozen=True)
class LDR(Structure):
    """The top left (out, in) block of `sum_i Z_1(A_i) @ Z_-1(B_i)`, with A and B (rank, max(in, out))."""

    rank: int = 1
    factor_dims = 2
    dense_up_to = 128

    def factor_shapes(self, out_features: int, in_features: int) -> tuple[Shape, Shape]:
        n = max(out_features, in_features)
        return (self.rank, n), (self.rank, n)

    def dense(self, a: Tensor, b: Tensor, out_features: int, in_features: int) -> Tensor:
        n = a.shape[-1]
        left, right = wrapped(a, 1, out_features, n), wrapped(b, -1, n, in_features)
        return left.transpose(-3, -2).flatten(-2) @ right.flatten(-3, -2)

    def fft_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        # one input channel to rank channels and back to one: x is transformed once, the sum is taken in the spectrum
        skew = convolve(x.unsqueeze(-2), b.unsqueeze(-2), a.shape[-1], -1)
        return convolve(skew, a.unsqueeze(-3), out_features, 1).squeeze(-2)
