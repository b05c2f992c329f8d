"""Circulant matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .convolution import convolve, wrapped
from .structure import Shape, Structure


@dataclass(frozen=True)
class Circulant(Structure):
    """The top left (out, in) block of `Z_1(A * B)`, with A and B (max(in, out),)."""

    factor_dims = 1
    dense_up_to = 64

    def factor_shapes(self, out_features: int, in_features: int) -> tuple[Shape, Shape]:
        n = max(out_features, in_features)
        return (n,), (n,)

    def dense(self, a: Tensor, b: Tensor, out_features: int, in_features: int) -> Tensor:
        return wrapped(a * b, 1, out_features, in_features)

    def fft_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        return convolve(x.unsqueeze(-2), (a * b)[..., None, None, :], out_features, 1).squeeze(-2)
