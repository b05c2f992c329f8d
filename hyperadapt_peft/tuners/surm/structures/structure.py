"""What the structures share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


Shape = tuple[int, ...]


class Structure:
    """A family of (out, in) matrices, each given by two factors A and B.

    Factors may have a batch dimension before their own, for a matrix per sample.
    """

    # Up to this width building the matrix and one GEMM beats the FFTs on a CPU, forward and backward; above it the FFTs
    # win by a growing factor, 6 for a circulant of width 768 and 16 for one of 2048. Where they cross depends little on
    # the number of tokens: at 1024 circulant crosses at 64, Toeplitz (FFTs of twice the width) and LDR(1) at 128. The
    # exception: LDR(4) with thousands of tokens would stay dense up to about 384. Source: benchmarks/surm_products.py.
    dense_up_to: ClassVar[float]
    factor_dims: ClassVar[int]  # of A and B, without a batch

    def factor_shapes(self, out_features: int, in_features: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and B."""
        raise NotImplementedError

    def dense(self, a: Tensor, b: Tensor, out_features: int, in_features: int) -> Tensor:
        """Return the matrix (out, in), or one per sample (batch, out, in)."""
        raise NotImplementedError

    def matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        """Multiply by the transposed matrix, which is not built unless that is faster.

        It is computed in `dtype_of` and differentiable once with respect to everything.

        Args:
            x (`Tensor`): (..., in); (batch, ..., in) for a matrix per sample.
            a (`Tensor`): A, of its shape in `factor_shapes`; with a batch dimension before it for a matrix per sample.
            b (`Tensor`): B, likewise.
            out_features (`int`): The number of rows.

        Returns:
            `Tensor`: (..., out) in the dtype of x.
        """
        dtype = self.dtype_of(x, a)
        z, a, b = x.to(dtype).reshape(*a.shape[: -self.factor_dims], -1, x.shape[-1]), a.to(dtype), b.to(dtype)
        # ONNX has no complex numbers, tracing makes tensors of sizes, and the FFT library refuses empty batches
        exported = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        use_dense = max(out_features, x.shape[-1]) <= self.dense_up_to or exported or z.numel() == 0
        y = (self.dense_matmul if use_dense else self.fft_matmul)(z, a, b, out_features)
        return y.to(x.dtype).reshape(*x.shape[:-1], out_features)

    def dtype_of(self, x: Tensor, a: Tensor) -> torch.dtype:
        """float32 or wider: an FFT in bfloat16 does not exist, one in float16 overflows."""
        return torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)

    def dense_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        """`matmul` of x ((batch,) tokens, in) by building the matrix."""
        return x @ self.dense(a, b, out_features, x.shape[-1]).transpose(-2, -1)

    def fft_matmul(self, x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
        """`matmul` of x ((batch,) tokens, in) by FFTs."""
        raise NotImplementedError
