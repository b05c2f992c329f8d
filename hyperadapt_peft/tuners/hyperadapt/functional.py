"""Scaling activations by `1 + offset`: the arithmetic of `W' = A W B` without touching W.

In a training step the naive formulas cost most in what autograd keeps and in passes over the activations. Here the input
is kept for its scale's gradient and the scaled output for the other's, both of which the model mostly keeps anyway, the
base layer's own output never, and each gradient is one product and one sum.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as torch_module


# Dividing the scaled output by a smaller scale would lose too many digits beside a bias; it is then computed again.
SMALLEST_DIVISOR = 0.1
_FULL_PRECISION = (torch.float32, torch.float64)


def scale(x: Tensor, offset: Tensor) -> Tensor:
    """Return `x * (1 + offset)` in x's dtype, rounded once: `1 + offset` itself is never rounded."""
    return torch.addcmul(x, x, offset.to(x.dtype))


def scale_input(x: Tensor, offset: Tensor, channel_dims: int = 0) -> Tensor:
    """Return `x * (1 + offset)` for a base layer's input, in x's dtype.

    Args:
        x: (..., size, *positions), where `positions` are the last `channel_dims` dimensions.
        offset: (size,), or (batch, size) with one row per sample.
        channel_dims: How many dimensions follow the channels.
    """
    if _is_composite(offset, x):
        return scale(x, _along_channels(offset, x, channel_dims))
    return _ScaleInput.apply(x, offset, channel_dims)


def scale_output(
    result: Tensor,
    offset: Tensor,
    bias: Optional[Tensor],
    again: Optional[Callable[[Tensor], Tensor]],
    inputs: tuple[Tensor, Optional[Tensor]],
    channel_dims: int = 0,
    in_place: bool = False,
    keep: bool = True,
) -> Tensor:
    """Return `result + (result - bias) * offset` for a base layer's output, in its dtype.

    Args:
        result: (..., size, *positions), where `positions` are the last `channel_dims` dimensions.
        offset: (size,), or (batch, size) with one row per sample.
        bias: (size,), the part of `result` that is not scaled, or None.
        again: Maps the base layer's input to `result` once more, if what is kept cannot serve. None if the base layer is
            not a function of its input alone: then autograd keeps `result`.
        inputs: The input before it was scaled and its offset (None if it was not): what `again` is called with then.
        channel_dims: How many dimensions follow the channels.
        in_place: Whether `result` is nobody else's and may be overwritten.
        keep: Whether the scaled output is kept for backward. Without, backward calls `again`: slower, but of this layer
            only the input is kept. (Under `torch.compile` the compiler decides.)
    """
    if again is None or _is_composite(offset, result):
        return _scale_output(result, offset, bias, channel_dims, in_place and not torch.is_grad_enabled())
    in_place = in_place and not result._is_view()  # autograd would have to copy the base of a view
    watch = _Watch()
    scaled = _ScaleOutput.apply(result, offset, bias, *inputs, again, channel_dims, in_place, watch if keep else None)
    watch.start(scaled)
    return scaled


def can_fuse(layer: nn.Module, x: Tensor, column: Optional[Tensor], row: Optional[Tensor]) -> bool:
    """Whether `scaled_linear` may stand for `layer` and its scales: a plain, frozen linear layer that nobody hooks."""
    if type(layer) is not nn.Linear or column is None or row is None or _is_composite(row, x):
        return False
    parameters = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    autocast = _autocast_state(x.device.type)
    return (
        all(type(parameter) is nn.Parameter and not parameter.requires_grad for parameter in parameters)
        and not (autocast and autocast["enabled"])
        and "forward" not in vars(layer)  # as offloading does
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and not (torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)
    )


def scaled_linear(
    x: Tensor, column: Tensor, row: Tensor, weight: Tensor, bias: Optional[Tensor], keep: bool = True
) -> Tensor:
    """Return `a * (W (b * x)) + bias` as one node of the graph: less bookkeeping than three, and one tensor less.

    Args:
        x: (..., m).
        column: (m,), b's offset from 1.
        row: (n,), a's offset from 1.
        weight: (n, m), frozen.
        bias: (n,), frozen, or None.
        keep: as in `scale_output`.
    """
    watch = _Watch()
    result = _ScaledLinear.apply(x, column, row, weight, bias, watch if keep else None)
    watch.start(result)
    return result


def _scale_output(result: Tensor, offset: Tensor, bias: Optional[Tensor], channel_dims: int, in_place: bool) -> Tensor:
    offset = _along_channels(offset, result, channel_dims)
    scaled = result.addcmul_(result, offset) if in_place else scale(result, offset)
    if bias is not None:
        bias = _along_channels(bias, result, channel_dims)
        out = None if torch.is_grad_enabled() else scaled  # autograd has no out
        scaled = torch.addcmul(scaled, bias, offset, value=-1, out=out)
    return scaled


def _is_composite(offset: Tensor, x: Tensor) -> bool:
    """Whether plain operations serve: nothing to differentiate, a batch of offsets, or a compiler that fuses them."""
    differentiable = torch.is_grad_enabled() and (offset.requires_grad or x.requires_grad)
    return not differentiable or offset.dim() > 1 or torch.compiler.is_compiling()


def _along_channels(vector: Tensor, like: Tensor, channel_dims: int) -> Tensor:
    """Shape (size,) or (batch, size) so that it multiplies the channels of `like`, in its dtype."""
    if vector.dtype != like.dtype:
        vector = vector.to(like.dtype)
    if channel_dims:
        vector = vector.reshape(*vector.shape, *(1,) * channel_dims)
    if vector.dim() == channel_dims + 1:
        return vector
    return vector.reshape(len(vector), *(1,) * (like.dim() - vector.dim()), *vector.shape[1:])


def _sum_to_channels(x: Tensor, channel_dims: int, dtype: torch.dtype) -> Tensor:
    """Sum over all but the channels, (size,), in float32 or wider, and round to `dtype`."""
    channels = x.dim() - 1 - channel_dims
    dims = [dim for dim in range(x.dim()) if dim != channels]
    wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    return (x.sum(dims, dtype=wide) if dims else x.clone()).to(dtype)


def _sum_products(grad: Tensor, x: Tensor, offset: Tensor, channel_dims: int) -> Tensor:
    """Sum `grad * x` over all but the channels, (size,) in offset's dtype."""
    if channel_dims == 0 and grad.dtype == x.dtype == offset.dtype and grad.numel() and grad.dtype in _FULL_PRECISION:
        # the gradient of a layer norm's weight is this sum, in one pass and up to three times as fast
        mean, rstd = grad.new_zeros(*grad.shape[:-1], 1), grad.new_ones(*grad.shape[:-1], 1)
        return torch.ops.aten.native_layer_norm_backward(
            grad, x, offset.shape, mean, rstd, offset, None, [False, True, False]
        )[1]
    return _sum_to_channels(grad * x, channel_dims, offset.dtype)


def _grad_of_row(
    grad: Tensor, result: Tensor, offset: Tensor, bias: Optional[Tensor], channel_dims: int, divide: bool
) -> Tensor:
    """The gradient of an output's scale, (size,): from the scaled output if `divide`, else from the base layer's."""
    total = _sum_products(grad, result, offset, channel_dims)
    if bias is not None:
        total = total - bias * _sum_to_channels(grad, channel_dims, offset.dtype)
    return total / (1 + offset) if divide else total


class _Watch:
    """Tells whether a tensor has been changed in place, without keeping its memory."""

    def start(self, tensor: Tensor) -> None:
        self.probe = tensor.detach()  # it shares the tensor's version counter
        self.probe.data = self.probe.new_empty(0)
        self.version = self.probe._version

    def changed(self) -> bool:
        return self.probe._version != self.version


def _serves(kept: Optional[Tensor], watch: Optional[_Watch], offset: Tensor) -> bool:
    """Whether the scaled output that was kept, if any, still gives the gradient of its scale."""
    if kept is None or watch is None or watch.changed():
        return False
    return bool(offset.min() >= SMALLEST_DIVISOR - 1)


class _ScaleInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, channel_dims: int) -> Tensor:
        ctx.channel_dims = channel_dims
        ctx.save_for_backward(offset, x if ctx.needs_input_grad[1] else None)
        return scale(x, _along_channels(offset, x, channel_dims))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        offset, x = ctx.saved_tensors
        grad_x = grad_offset = None
        if ctx.needs_input_grad[0]:
            grad_x = scale(grad, _along_channels(offset, grad, ctx.channel_dims))
        if ctx.needs_input_grad[1]:
            grad_offset = _sum_products(grad, x, offset, ctx.channel_dims)
        return grad_x, grad_offset, None


class _ScaleOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        offset: Tensor,
        bias: Optional[Tensor],
        x: Tensor,
        column: Optional[Tensor],
        again: Callable[[Tensor], Tensor],
        channel_dims: int,
        in_place: bool,
        watch: Optional[_Watch],
    ) -> Tensor:
        if in_place:
            ctx.mark_dirty(result)
        scaled = _scale_output(result, offset, bias, channel_dims, in_place)
        ctx.again, ctx.channel_dims, ctx.watch = again, channel_dims, watch
        ctx.autocast = _autocast_state(result.device.type)
        if ctx.needs_input_grad[1]:
            # A model may change a linear layer's output in place, and autograd's own check would refuse it: what is
            # saved has a version counter of its own, and `watch` sees the output's.
            ctx.save_for_backward(offset, bias, x, column, scaled.data if watch is not None else None)
        else:
            ctx.save_for_backward(offset, None, None, None, None)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        offset, bias, x, column, kept = ctx.saved_tensors
        grad_result = grad_offset = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_result = scale(grad, _along_channels(offset, grad, ctx.channel_dims))
        if ctx.needs_input_grad[1]:
            intact = _serves(kept, ctx.watch, offset)
            if intact:
                result = kept
            else:
                with torch.autocast(**ctx.autocast) if ctx.autocast else nullcontext():
                    inputs = x if column is None else scale(x, _along_channels(column, x, ctx.channel_dims))
                    result = ctx.again(inputs)
            grad_offset = _grad_of_row(grad, result, offset, bias, ctx.channel_dims, divide=intact)
        if ctx.needs_input_grad[2]:
            grad_bias = -offset * _sum_to_channels(grad, ctx.channel_dims, offset.dtype)
        return grad_result, grad_offset, grad_bias, None, None, None, None, None, None


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        column: Tensor,
        row: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        watch: Optional[_Watch],
    ) -> Tensor:
        result = _scale_output(F.linear(scale(x, column), weight, bias), row, bias, 0, in_place=True)
        result = result.data  # no view of anything: autograd would refuse a model that changes it in place
        ctx.watch = watch
        trains_column, trains_row = ctx.needs_input_grad[1:3]
        kept = result.data if trains_row and watch is not None else None
        ctx.save_for_backward(x if trains_column or trains_row else None, column, row, weight, bias, kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, column, row, weight, bias, kept = ctx.saved_tensors
        grad_x = grad_column = grad_row = None
        if ctx.needs_input_grad[2]:
            intact = _serves(kept, ctx.watch, row)
            result = kept if intact else F.linear(scale(x, column), weight, bias)
            grad_row = _grad_of_row(grad, result, row, bias, 0, divide=intact)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            inner = scale(grad, row) @ weight
            if ctx.needs_input_grad[1]:
                grad_column = _sum_products(inner, x, column, 0)
            if ctx.needs_input_grad[0]:
                grad_x = inner.addcmul_(inner, column.to(inner.dtype))
        return grad_x, grad_column, grad_row, None, None, None


def _autocast_state(device: str) -> Optional[dict[str, Any]]:
    """The arguments of the autocast that is on or off now, for backward; None where there is no autocast."""
    if not torch.amp.is_autocast_available(device):
        return None
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled}
