"""Products of two Toeplitz matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .convolution import convolve, diagonals_to_dense
from .structure import Shape, Structure


@dataclass(frozen=True)
class Toeplitz(Structure):
    """`T(B) @ T(A)`, T(A) (in, in) and T(B) (out, in).

    Symmetric: `T_ij = t_|i-j|`, A (in,) and B (max(in, out),). General: `T_ij = t_(i - j + in - 1)`, the diagonals from
    the top right corner to the bottom left one, A (2 in - 1,) and B (out + in - 1,).
    """

    symmetric: bool = True
    factor_dims = 1
    dense_up_to = 128

    def factor_shapes(self, out_features: int, in_features: int) -> tuple[Shape, Shape]:
        if self.symmetric:
            return (in_features,), (max(out_features, in_features),)
        return (2 * in_features - 1,), (out_features + in_features - 1,)

    def dense(self, a: Tensor, b: Tensor, out_features: int, in_features: int) -> Tensor:
        return self._single(b, out_features, in_features) @ self._single(a, in_features, in_features)

    def dense_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        for t, rows in ((a, x.shape[-1]), (b, out_features)):  # two GEMMs keep the cost of one token at n^2
            x = x @ self._single(t, rows, x.shape[-1]).transpose(-2, -1)
        return x

    def fft_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        return self._single_fft(self._single_fft(x, a, x.shape[-1]), b, out_features)

    def _diagonals(self, t: Tensor, rows: int, columns: int) -> Tensor:
        """The values of all diagonals, from the top right corner to the bottom left one: (..., rows + columns - 1)."""
        return torch.cat([t[..., 1:columns].flip(-1), t[..., :rows]], dim=-1) if self.symmetric else t

    def _single(self, t: Tensor, rows: int, columns: int) -> Tensor:
        return diagonals_to_dense(self._diagonals(t, rows, columns), rows, columns)

    def _single_fft(self, x: Tensor, t: Tensor, rows: int) -> Tensor:
        """One Toeplitz product, as a block of a circulant one wide enough that nothing wraps into it."""
        columns = x.shape[-1]
        upper, lower = self._diagonals(t, rows, columns).tensor_split([columns - 1], dim=-1)
        padding = lower.new_zeros(*t.shape[:-1], _fast_length(rows + columns - 1) - rows - columns + 1)
        first_column = torch.cat([lower, padding, upper], dim=-1)
        return convolve(x.unsqueeze(-2), first_column[..., None, None, :], rows, 1).squeeze(-2)


def _fast_length(n: int) -> int:
    """The least even length >= n of the form 2^k (1, 3, 5, 9, 15 or 27): at most 20 % longer, and FFTs are fast there."""
    return min(m << max(1, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15, 27))
