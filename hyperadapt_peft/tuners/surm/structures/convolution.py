"""Cyclic (f = 1) and negacyclic (f = -1) convolution: the products of circulant, Toeplitz and LDR matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...common.autograd import in_transform


def convolve(x: Tensor, v: Tensor, out_features: int, f: int) -> Tensor:
    """Return `y_o = sum_i Z_f(v_oi) x_i`, by FFTs.

    Args:
        x (`Tensor`): ((batch,) tokens, i, in), in <= n.
        v (`Tensor`): ((batch,) o, i, n).
        out_features (`int`): out <= n.
        f (`int`): 1 or -1.

    Returns:
        `Tensor`: ((batch,) tokens, o, out).
    """
    if in_transform():
        n = v.shape[-1]
        return _signal(_mix(_spectrum(x, n, f), _spectrum(v, n, f)), n, f)[..., :out_features]
    return _Convolution.apply(x, v, out_features, f)


class _Convolution(torch.autograd.Function):
    # Autograd through torch.fft takes up to twice the time: it differentiates a real FFT by a complex one of full length.
    # Here both gradients are again convolutions of the spectra at hand.

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, out_features: int, f: int) -> Tensor:
        ctx.in_features, ctx.n, ctx.f = x.shape[-1], v.shape[-1], f
        x_spectrum, v_spectrum = _spectrum(x, ctx.n, f), _spectrum(v, ctx.n, f)
        ctx.save_for_backward(x_spectrum, v_spectrum)
        return _signal(_mix(x_spectrum, v_spectrum), ctx.n, f)[..., :out_features]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x_spectrum, v_spectrum = ctx.saved_tensors
        n, f = ctx.n, ctx.f
        grad_spectrum = _spectrum(grad, n, f)
        grad_x = grad_v = None
        if ctx.needs_input_grad[0]:
            adjoint = v_spectrum.conj().transpose(-3, -2)
            grad_x = _signal(_mix(grad_spectrum, adjoint), n, f)[..., : ctx.in_features]
        if ctx.needs_input_grad[1]:
            correlation = torch.linalg.vecdot(x_spectrum.unsqueeze(-3), grad_spectrum.unsqueeze(-2), dim=-4)
            grad_v = _signal(correlation, n, f)
        return grad_x, grad_v, None, None


def _mix(x: Tensor, v: Tensor) -> Tensor:
    """Sum over the input channels: (..., tokens, i, k) and (..., o, i, k) to (..., tokens, o, k)."""
    if v.shape[-2] == 1:
        return x * v[..., 0, :].unsqueeze(-3)
    return (x.unsqueeze(-3) * v.unsqueeze(-4)).sum(-2)


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


def _twist(n: int, like: Tensor) -> Tensor:
    """The n/2 numbers exp(i pi j / n) which turn a negacyclic convolution into a cyclic one."""
    angle = torch.arange(n // 2, dtype=like.dtype, device=like.device) * (math.pi / n)
    return torch.polar(torch.ones_like(angle), angle)


def _signs(n: int, like: Tensor) -> Tensor:
    """The signs +1, -1, +1, ... (n,)."""
    return 1 - 2 * (torch.arange(n, device=like.device) % 2).to(like.dtype)


def diagonals_to_dense(diagonals: Tensor, rows: int, columns: int) -> Tensor:
    """(..., rows + columns - 1), from the top right corner to the bottom left one, to (..., rows, columns)."""
    # each row is the one above it, moved by one: repeated with a gap of one, and read in steps of one less than that
    step = rows + columns - 1
    repeated = F.pad(diagonals.flip(-1), (0, 1)).unsqueeze(-2).expand(*diagonals.shape[:-1], rows, step + 1)
    return repeated.flatten(-2)[..., rows - 1 : rows - 1 + rows * step].unflatten(-1, (rows, step))[..., :columns]


def wrapped(v: Tensor, f: int, rows: int, columns: int) -> Tensor:
    """The top left (..., rows, columns) block of Z_f(v), for v (..., n)."""
    n = v.shape[-1]
    return diagonals_to_dense(torch.cat([f * v[..., n - columns + 1 :], v[..., :rows]], dim=-1), rows, columns)
