"""Adding, interpolating and inverting adapters, as pure functions of their scales' offsets from 1.

An adapter scales a weight by `a` (rows) and `b` (columns). `(c a, b / c)` is the same update for every c != 0, so what
is not the same in every gauge is computed in a canonical one. All of it is done in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor


Offsets = tuple[Optional[Tensor], Optional[Tensor]]  # of rows and columns; None where a side is not scaled
COMBINATION_TYPES = ("linear", "log", "product")


def combine(adapters: Sequence[Offsets], weights: Sequence[float], combination_type: str) -> Offsets:
    """Return the weighted combination of adapters, as `HyperAdaptModel.add_weighted_adapter` says.

    Args:
        adapters: Each adapter's offsets (n,) and (m,), or (E, n) and (E, m) of E weights.
        weights: One weight per adapter. An adapter of weight 0 has no influence.
        combination_type: `"linear"`, in the canonical gauge, `"log"` or `"product"`.

    Raises:
        ValueError: If the type is unknown, or `"log"` meets scales that are zero or of different signs.
    """
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"Invalid combination_type: {combination_type!r}; it must be one of {COMBINATION_TYPES}.")
    used = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight != 0]
    shapes = [next((a[side] for a in adapters if a[side] is not None), None) for side in (0, 1)]
    rows, columns = (
        [(_wide(adapter[side], shape), weight) for adapter, weight in used] for side, shape in enumerate(shapes)
    )
    if combination_type == "linear":
        combined = _linear(rows, columns, both=shapes[0] is not None and shapes[1] is not None)
    elif combination_type == "log":
        combined = _log(rows), _log(columns)
    else:
        combined = _product(rows), _product(columns)
    row, column = (
        None if shape is None else side.expand_as(shape).to(shape)
        for shape, side in zip(shapes, combined, strict=True)
    )
    return row, column


def invert(offset: Optional[Tensor]) -> Optional[Tensor]:
    """Return the offsets of the scales `1 / (1 + offset)`, (size,).

    Raises:
        ValueError: If a scale is zero.
    """
    if offset is None:
        return None
    wide = offset.double()
    if (wide == -1).any():
        raise ValueError("a scale is zero, which nothing can undo")
    return (-wide / (1 + wide)).to(offset.dtype)


def gauge(row: Tensor, column: Tensor) -> Tensor:
    """Return c (..., 1) such that `(c a, b / c)` is canonical: equal geometric means, and most of a positive.

    Args:
        row: The offsets of a, (..., n). Zero scales do not count.
        column: The offsets of b, (..., m), likewise.
    """
    a, b = 1 + row, 1 + column
    logarithms = (torch.where(x == 0, torch.nan, x.abs().log()) for x in (a, b))
    means = [x.nanmean(-1, keepdim=True).nan_to_num() for x in logarithms]
    sign = 1 - 2 * (a.sign().sum(-1, keepdim=True) < 0).to(a.dtype)
    return sign * torch.exp((means[1] - means[0]) / 2)


def _wide(offset: Optional[Tensor], like: Optional[Tensor]) -> Tensor:
    if offset is None:
        offset = torch.zeros(()) if like is None else torch.zeros_like(like)
    return offset.double()


def _linear(
    rows: list[tuple[Tensor, float]], columns: list[tuple[Tensor, float]], both: bool
) -> tuple[Tensor, Tensor]:
    one = torch.ones((), dtype=torch.float64)
    gauges = [gauge(row, column) if both else one for (row, _), (column, _) in zip(rows, columns, strict=True)]
    total = sum(weight for _, weight in rows)
    # back to the adapters' own gauge where they share one, so that a single adapter comes back as it was
    back = torch.stack([c.abs().log() * w for c, (_, w) in zip(gauges, rows, strict=True)] or [one * 0]).sum(0)
    back = torch.exp(back / total) if total else one
    row = sum((w * (c * (1 + d) - 1) for c, (d, w) in zip(gauges, rows, strict=True)), start=one * 0)
    column = sum((w * ((1 + d) / c - 1) for c, (d, w) in zip(gauges, columns, strict=True)), start=one * 0)
    return (1 + row) / back - 1, (1 + column) * back - 1


def _log(terms: list[tuple[Tensor, float]]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    if not terms:
        return total
    signs = torch.stack([(1 + offset).sign() for offset, _ in terms])
    negative = signs[0] < 0
    if (signs == 0).any():
        raise ValueError("a scale is zero and has no logarithm; use combination_type='linear'")
    if (signs != signs[0]).any() or (negative.any() and abs(sum(weight for _, weight in terms) - 1) > 1e-6):
        raise ValueError("negative scales have no logarithm; use combination_type='linear'")
    # log1p keeps small offsets exact; -1 - (1 + d) is the offset of the positive scale -(1 + d)
    for offset, weight in terms:
        total = total + weight * torch.log1p(torch.where(negative, -2 - offset, offset))
    return torch.where(negative, -2 - torch.expm1(total), torch.expm1(total))


def _product(terms: list[tuple[Tensor, float]]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for offset, weight in terms:
        total = total + weight * offset + total * weight * offset
    return total
