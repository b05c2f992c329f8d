"""Scaling activations by `1 + factor * offset`: the arithmetic of `W' = A W B` without touching W.

Nothing here looks at values, so nothing waits for a GPU; small offsets, zero and negative scales are as good as any.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..common.autograd import in_transform


def scale(
    x: Tensor, offset: Tensor, factor: float = 1.0, shift: Optional[Tensor] = None, save_memory: bool = False
) -> Tensor:
    """Return `x + factor * offset * (x - shift)` in x's dtype; `1 + factor * offset` itself is never rounded.

    Args:
        x: The activations, of any shape.
        offset: Broadcasts to x.
        factor: A number that the offset is multiplied by.
        shift: The part of x that is not scaled, a bias; it broadcasts to x. 0 if None.
        save_memory: Whether x, which only the offset's gradient needs, is kept for it in 8 bits.
    """
    if shift is not None:
        shift = shift.to(x.dtype)
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform()
    if not plain:
        return _Scale.apply(x, offset, factor, shift, save_memory)
    if offset.dtype != x.dtype:  # asking is faster than a `to` with nothing to do
        offset = offset.to(x.dtype)
    return _scale(x, offset, factor, shift)


def _scale(x: Tensor, offset: Tensor, factor: float, shift: Optional[Tensor]) -> Tensor:
    scaled = torch.addcmul(x, x, offset, value=factor)
    return scaled if shift is None else torch.addcmul(scaled, shift, offset, value=-factor)


class _Scale(torch.autograd.Function):
    """`_scale` with fewer kernels than autograd would take, and x's gradient rounded once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, factor: float, shift: Optional[Tensor], save_memory: bool
    ) -> Tensor:
        rounded, ctx.factor = offset.to(x.dtype), factor
        kept = (_in_8_bits(x) if save_memory else x) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, offset, rounded, shift)
        return _scale(x, rounded, factor, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, offset, rounded, shift = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            rounded = offset.to(grad.dtype)
            if x is not None and x.dtype == torch.float8_e5m2:
                raise RuntimeError("`save_memory=True` keeps too little for second derivatives.")
        grad_x = grad_offset = grad_shift = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addcmul(grad, grad, rounded.conj(), value=ctx.factor)
        if ctx.needs_input_grad[1]:
            total = _sum_to(grad * x.conj().to(grad.dtype), offset)
            if shift is not None:
                total = total - shift.conj() * _sum_to(grad, offset)
            grad_offset = ctx.factor * total
        if ctx.needs_input_grad[3]:
            grad_shift = _sum_to(-ctx.factor * rounded.conj() * grad, shift)
        return grad_x, grad_offset, None, grad_shift, None


_kept: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()  # for all layers that share an input


def _in_8_bits(x: Tensor) -> Tensor:
    """Return x in 8 bits: of each number 2 bits after the first one, which err by 6 % (rms), and all of the usual range.

    Summed over the tokens of a batch, that is some 5 % of what the gradient differs by from batch to batch.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return x
    version, kept = _kept.get(x, (None, x))
    if version != x._version:
        limit = torch.finfo(torch.float8_e5m2).max
        kept = x.detach().clamp(-limit, limit).to(torch.float8_e5m2)
        _kept[x] = x._version, kept
    return kept


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sum x over the dimensions along which `like` was broadcast to it, in the dtype of `like`."""
    added = x.dim() - like.dim()
    dims = [*range(added), *(added + i for i, size in enumerate(like.shape) if size == 1)]
    total = x.sum(dims, dtype=like.dtype) if dims else x.to(like.dtype)
    if total.shape != like.shape:  # reshaping to the same shape takes as long as the sum
        total = total.reshape(like.shape)
    return total
