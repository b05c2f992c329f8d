"""The structured matrices of SURM as pure functions: each product beside a dense builder of the same matrix.

Source: Sehanobish et al., "Structured Unrestricted-Rank Matrices for Parameter Efficient Fine-tuning",
NeurIPS 2024, https://huggingface.co/papers/2406.17740.

Everything uses the first-column convention. `Z_f(v)` is the n x n matrix with first column `v` whose diagonals wrap
around with the factor `f`: entry (i, j) is `v[i - j]` for i >= j and `f * v[n + i - j]` else. `Z_1` is circulant,
`Z_-1` skew-circulant.

    structure   matrix (out x in)                     trained numbers, square of width n
    circulant   Z_1(left * right)                     2n
    toeplitz    T(outer) @ T(inner), T_ij = t_|i-j|   2n, or 2 (2n - 1) in the general form
    kronecker   A (x) B                               the fewest over all factor shapes: 2 * 24 * 32 for n = 768
    ldr         sum_i Z_1(g_i) @ Z_-1(h_i)            2nr

`<name>_matmul(x, *factors, out_features)` maps x (..., in) to x @ dW^T (..., out) and never builds dW;
`<name>_dense(*factors, out_features, in_features)` builds dW. Both differentiate with respect to everything. Products
are computed in at least float32, whatever the type of x (an FFT in bfloat16 does not exist, one in float16 overflows),
and return the type of x.

A rectangular circulant or LDR matrix is the top left block of the square one of width max(in, out). Toeplitz and
Kronecker matrices are rectangular by nature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


# ---------------------------------------------------------------------------------------------------------------------
# Cyclic and negacyclic convolution, the one engine of circulant, Toeplitz and LDR products
# ---------------------------------------------------------------------------------------------------------------------


def _twist(n: int, like: Tensor) -> Tensor:
    """The n/2 numbers exp(i pi j / n) which turn a negacyclic convolution into a cyclic one."""
    angle = torch.arange(n // 2, dtype=like.dtype, device=like.device) * (math.pi / n)
    return torch.polar(torch.ones_like(angle), angle)


def _signs(n: int, like: Tensor) -> Tensor:
    """+1, -1, +1, ... (n,)"""
    return 1 - 2 * (torch.arange(n, device=like.device) % 2).to(like.dtype)


def _spectrum(x: Tensor, n: int, f: int) -> Tensor:
    """Transform (..., m <= n) real to (..., about n/2) complex, in which `Z_f` acts elementwise.

    f = 1 is the real FFT. For f = -1 the transform stays as small: n odd, the change of variable X -> -X makes
    X^n + 1 into X^n - 1 (up to sign), so alternating signs suffice; n even, the two halves of x become the real and
    imaginary part of n/2 complex numbers, as X^n + 1 = (X^(n/2) - i)(X^(n/2) + i).
    """
    if f == 1:
        return torch.fft.rfft(x, n=n)
    if n % 2:
        return torch.fft.rfft(x * _signs(x.shape[-1], x), n=n)
    x = F.pad(x, (0, n - x.shape[-1]))
    return torch.fft.fft(torch.complex(x[..., : n // 2], x[..., n // 2 :]) * _twist(n, x))


def _signal(spectrum: Tensor, n: int, f: int) -> Tensor:
    """The inverse of `_spectrum`: (..., n) real."""
    if f == 1:
        return torch.fft.irfft(spectrum, n=n)
    if n % 2:
        x = torch.fft.irfft(spectrum, n=n)
        return x * _signs(n, x)
    z = torch.fft.ifft(spectrum)
    z = z * _twist(n, z.real).conj()
    return torch.cat([z.real, z.imag], dim=-1)


def _mix(x: Tensor, v: Tensor) -> Tensor:
    """Sum over the input channels: (..., i, k) and (o, i, k) to (..., o, k)."""
    if v.shape[1] == 1:
        return x * v[:, 0]
    return (x.unsqueeze(-3) * v).sum(-2)


class _Convolution(torch.autograd.Function):
    """y_o = sum_i Z_f(v_oi) x_i, with x (tokens, i, in), v (o, i, n) and y (tokens, o, out); in, out <= n.

    Autograd through torch.fft gives the same numbers in about twice the time: it differentiates a real FFT by a
    complex one of full length. Here both gradients are again convolutions of the spectra at hand.
    """

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, out_features: int, f: int) -> Tensor:
        n = v.shape[-1]
        x_spectrum, v_spectrum = _spectrum(x, n, f), _spectrum(v, n, f)
        ctx.save_for_backward(x_spectrum, v_spectrum)
        ctx.in_features, ctx.n, ctx.f = x.shape[-1], n, f
        return _signal(_mix(x_spectrum, v_spectrum), n, f)[..., :out_features]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x_spectrum, v_spectrum = ctx.saved_tensors
        n, f = ctx.n, ctx.f
        grad_spectrum = _spectrum(grad, n, f)
        grad_x = grad_v = None
        if ctx.needs_input_grad[0]:
            adjoint = v_spectrum.conj().transpose(0, 1)
            grad_x = _signal(_mix(grad_spectrum, adjoint), n, f)[..., : ctx.in_features]
        if ctx.needs_input_grad[1]:
            correlation = torch.linalg.vecdot(x_spectrum.unsqueeze(1), grad_spectrum.unsqueeze(2), dim=0)
            grad_v = _signal(correlation, n, f)
        return grad_x, grad_v, None, None


def _convolve(x: Tensor, v: Tensor, out_features: int, f: int) -> Tensor:
    """`_Convolution` for x (..., i, in) with any number of leading dimensions."""
    if x.numel() == 0:  # an expert without tokens: the FFT library refuses empty batches
        return x.new_zeros(*x.shape[:-2], v.shape[0], out_features) * (x.sum() + v.sum())
    y = _Convolution.apply(x.reshape(-1, *x.shape[-2:]), v, out_features, f)
    return y.reshape(*x.shape[:-2], *y.shape[-2:])


def _diagonals_to_dense(diagonals: Tensor, rows: int, columns: int) -> Tensor:
    """(..., rows + columns - 1), from the top right corner to the bottom left one, to (..., rows, columns)."""
    return diagonals.unfold(-1, columns, 1).flip(-1)


def _wrapped_dense(v: Tensor, f: int, rows: int, columns: int) -> Tensor:
    """The top left (..., rows, columns) block of Z_f(v), for v (..., n)."""
    n = v.shape[-1]
    return _diagonals_to_dense(torch.cat([f * v[..., n - columns + 1 :], v[..., :rows]], dim=-1), rows, columns)


# ---------------------------------------------------------------------------------------------------------------------
# FFT or dense
# ---------------------------------------------------------------------------------------------------------------------

# Up to this width building the matrix and one GEMM beats the FFTs on a CPU, forward and backward; above it the FFTs win
# by a growing factor, 6 for a circulant of width 768 and 16 for one of 2048. Where they cross depends little on the
# number of tokens, so the rule does not ask for it: at 1024 tokens circulant crosses at 64, Toeplitz (FFTs of twice the
# width) and LDR(1) at 128. The exception: LDR(4) with thousands of tokens would stay dense up to about 384.
# Source: benchmarks/surm_products.py, with its rows in benchmarks/results/surm_products.json.
DENSE_UP_TO = {"circulant": 64, "toeplitz": 128, "ldr": 128}

# The type of `method`: "auto" follows DENSE_UP_TO, the other two are for the benchmark and the tests.
Method = Literal["auto", "fft", "dense"]


def _use_dense(method: Method, structure: str, width: int) -> bool:
    if method not in ("auto", "fft", "dense"):
        raise ValueError(f'method must be "auto", "fft" or "dense", got {method!r}')
    return method == "dense" or (method == "auto" and width <= DENSE_UP_TO[structure])


def _promote(x: Tensor, *factors: Tensor) -> list[Tensor]:
    """Bring all to one type, float32 or wider."""
    dtype = torch.float32
    for tensor in (x, *factors):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in (x, *factors)]


def _check(structure: str, found: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> None:
    shapes = [tuple(factor.shape) for factor in found]
    if shapes != list(expected):
        raise ValueError(f"{structure}: expected factors of shape {list(expected)}, got {shapes}")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------

STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@cache
def _kronecker_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(a, c) and (b, d) with a b = out, c d = in and the least a c + b d.

    Ties go to the highest attainable rank, min(a, c) * min(b, d): a row times a column (1 x n) (x) (n x 1) has as few
    numbers as (24 x 32) (x) (32 x 24), but rank one. A last tie goes to the smaller a.
    """

    def cost(a: int, c: int) -> tuple[int, int, int]:
        b, d = out_features // a, in_features // c
        return a * c + b * d, -min(a, c) * min(b, d), a

    a, c = min(((a, c) for a in _divisors(out_features) for c in _divisors(in_features)), key=lambda ac: cost(*ac))
    return (a, c), (out_features // a, in_features // c)


def factor_shapes(
    structure: str, out_features: int, in_features: int, *, rank: int = 1, symmetric: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the two trained tensors of a structure, in the order in which its functions take them.

    With N = max(out, in):
        circulant: left (N,), right (N,)
        toeplitz: inner (in,), outer (N,); not symmetric: inner (2 in - 1,), outer (out + in - 1,)
        kronecker: A (a, c), B (b, d) with a b = out, c d = in and the fewest numbers
        ldr: circulant (rank, N), skew (rank, N)

    Raises:
        ValueError: an unknown structure, or a size or rank below one.
    """
    if min(out_features, in_features, rank) < 1:
        raise ValueError(f"sizes and rank must be at least 1, got {out_features} x {in_features}, rank {rank}")
    n = max(out_features, in_features)
    if structure == "circulant":
        return (n,), (n,)
    if structure == "toeplitz":
        return ((in_features,), (n,)) if symmetric else ((2 * in_features - 1,), (out_features + in_features - 1,))
    if structure == "kronecker":
        return _kronecker_shapes(out_features, in_features)
    if structure == "ldr":
        return (rank, n), (rank, n)
    raise ValueError(f"unknown structure {structure!r}, expected one of {STRUCTURES}")


# ---------------------------------------------------------------------------------------------------------------------
# Circulant
# ---------------------------------------------------------------------------------------------------------------------


def circulant_dense(left: Tensor, right: Tensor, out_features: int, in_features: int) -> Tensor:
    """The top left (out, in) block of Z_1(left * right), with left and right (max(in, out),).

    Raises:
        ValueError: factors of other shapes.
    """
    _check("circulant", (left, right), factor_shapes("circulant", out_features, in_features))
    return _wrapped_dense(left * right, 1, out_features, in_features)


def circulant_matmul(x: Tensor, left: Tensor, right: Tensor, out_features: int, method: Method = "auto") -> Tensor:
    """x (..., in) times the transpose of `circulant_dense`: (..., out), in the type of x.

    Raises:
        ValueError: factors of other shapes.
    """
    _check("circulant", (left, right), factor_shapes("circulant", out_features, x.shape[-1]))
    z, left, right = _promote(x, left, right)
    if _use_dense(method, "circulant", left.shape[-1]):
        y = F.linear(z, circulant_dense(left, right, out_features, z.shape[-1]))
    else:
        y = _convolve(z.unsqueeze(-2), (left * right).expand(1, 1, -1), out_features, 1).squeeze(-2)
    return y.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Toeplitz
# ---------------------------------------------------------------------------------------------------------------------


def _diagonals(t: Tensor, rows: int, columns: int, symmetric: bool) -> Tensor:
    """The values of all diagonals, from the top right corner to the bottom left one: (rows + columns - 1,)."""
    return torch.cat([t[1:columns].flip(0), t[:rows]]) if symmetric else t


def _fast_length(n: int) -> int:
    """The least even length >= n of the form 2^k (1, 3, 5, 9, 15 or 27): at most 20 % longer, and FFTs are fast there."""
    return min(m << max(1, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15, 27))


def _toeplitz_fft(x: Tensor, diagonals: Tensor, rows: int) -> Tensor:
    """One Toeplitz product, as a block of a circulant one wide enough that nothing wraps into it."""
    columns = x.shape[-1]
    n = _fast_length(rows + columns - 1)
    upper, lower = diagonals[: columns - 1], diagonals[columns - 1 :]
    first_column = torch.cat([lower, lower.new_zeros(n - len(diagonals)), upper])
    return _convolve(x.unsqueeze(-2), first_column.expand(1, 1, -1), rows, 1).squeeze(-2)


def toeplitz_dense(
    inner: Tensor, outer: Tensor, out_features: int, in_features: int, symmetric: bool = True
) -> Tensor:
    """T(outer) @ T(inner) (out, in), where T(inner) is (in, in) and T(outer) is (out, in).

    symmetric: T_ij = t_|i-j|, inner (in,), outer (max(in, out),). Otherwise T_ij = t_(i - j + in - 1): the diagonals
    from the top right corner to the bottom left one, inner (2 in - 1,), outer (out + in - 1,).

    Raises:
        ValueError: factors of other shapes.
    """
    _check("toeplitz", (inner, outer), factor_shapes("toeplitz", out_features, in_features, symmetric=symmetric))
    inner = _diagonals(inner, in_features, in_features, symmetric)
    outer = _diagonals(outer, out_features, in_features, symmetric)
    first = _diagonals_to_dense(inner, in_features, in_features)
    return _diagonals_to_dense(outer, out_features, in_features) @ first


def toeplitz_matmul(
    x: Tensor, inner: Tensor, outer: Tensor, out_features: int, symmetric: bool = True, method: Method = "auto"
) -> Tensor:
    """x (..., in) times the transpose of `toeplitz_dense`: (..., out), in the type of x.

    Raises:
        ValueError: factors of other shapes.
    """
    in_features = x.shape[-1]
    _check("toeplitz", (inner, outer), factor_shapes("toeplitz", out_features, in_features, symmetric=symmetric))
    z, inner, outer = _promote(x, inner, outer)
    inner = _diagonals(inner, in_features, in_features, symmetric)
    outer = _diagonals(outer, out_features, in_features, symmetric)
    if _use_dense(method, "toeplitz", max(in_features, out_features)):
        # Two GEMMs or one of the multiplied matrices: two keep the cost of one token at n^2.
        z = F.linear(z, _diagonals_to_dense(inner, in_features, in_features))
        y = F.linear(z, _diagonals_to_dense(outer, out_features, in_features))
    else:
        y = _toeplitz_fft(_toeplitz_fft(z, inner, in_features), outer, out_features)
    return y.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker
# ---------------------------------------------------------------------------------------------------------------------


def kronecker_dense(a: Tensor, b: Tensor, out_features: int, in_features: int) -> Tensor:
    """A (x) B (out, in), of any two matrices with a.shape[0] * b.shape[0] = out and a.shape[1] * b.shape[1] = in.

    Raises:
        ValueError: the factors do not multiply to (out, in).
    """
    _check_kronecker(a, b, out_features, in_features)
    return torch.kron(a, b)


def _check_kronecker(a: Tensor, b: Tensor, out_features: int, in_features: int) -> None:
    shapes = tuple(a.shape), tuple(b.shape)
    if (
        a.dim() != 2
        or b.dim() != 2
        or (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]) != (out_features, in_features)
    ):
        raise ValueError(f"kronecker: factors {shapes[0]} and {shapes[1]} do not give {out_features} x {in_features}")


def kronecker_matmul(x: Tensor, a: Tensor, b: Tensor, out_features: int) -> Tensor:
    """x (..., in) times (A (x) B)^T: (..., out), in the type of x. The product is never built.

    x as a matrix X of A's columns times B's columns goes to A X B^T; the cheaper side goes first.

    Raises:
        ValueError: the factors do not multiply to (out, in).
    """
    _check_kronecker(a, b, out_features, x.shape[-1])
    z, a, b = _promote(x, a, b)
    (rows_a, columns_a), (rows_b, columns_b) = a.shape, b.shape
    z = z.unflatten(-1, (columns_a, columns_b))
    if columns_b * (columns_a + rows_b) * rows_a <= columns_a * (columns_b + rows_a) * rows_b:
        y = F.linear(F.linear(z.mT, a).mT, b)
    else:
        y = F.linear(F.linear(z, b).mT, a).mT
    return y.flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# LDR: low displacement rank
# ---------------------------------------------------------------------------------------------------------------------


def ldr_dense(circulant: Tensor, skew: Tensor, out_features: int, in_features: int) -> Tensor:
    """The top left (out, in) block of sum_i Z_1(circulant_i) @ Z_-1(skew_i), with both factors (rank, max(in, out)).

    Raises:
        ValueError: factors of other shapes.
    """
    expected = factor_shapes("ldr", out_features, in_features, rank=max(1, circulant.shape[0]))
    _check("ldr", (circulant, skew), expected)
    n = circulant.shape[-1]
    left, right = _wrapped_dense(circulant, 1, out_features, n), _wrapped_dense(skew, -1, n, in_features)
    return left.transpose(0, 1).flatten(1) @ right.flatten(0, 1)


def ldr_matmul(x: Tensor, circulant: Tensor, skew: Tensor, out_features: int, method: Method = "auto") -> Tensor:
    """x (..., in) times the transpose of `ldr_dense`: (..., out), in the type of x.

    Raises:
        ValueError: factors of other shapes.
    """
    expected = factor_shapes("ldr", out_features, x.shape[-1], rank=max(1, circulant.shape[0]))
    _check("ldr", (circulant, skew), expected)
    z, circulant, skew = _promote(x, circulant, skew)
    n = circulant.shape[-1]
    if _use_dense(method, "ldr", n):
        y = F.linear(z, ldr_dense(circulant, skew, out_features, z.shape[-1]))
    else:
        # One input channel to rank channels and back to one: x is transformed once, the sum is taken in the spectrum.
        y = _convolve(_convolve(z.unsqueeze(-2), skew.unsqueeze(1), n, -1), circulant.unsqueeze(0), out_features, 1)
        y = y.squeeze(-2)
    return y.to(x.dtype)
