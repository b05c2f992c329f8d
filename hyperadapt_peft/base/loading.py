"""Checks of what is loaded into an adapter, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_tensors(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the tensor, unless `given` has the names and shapes of `expected` and is finite.

    Args:
        expected: The adapter's tensors in the model.
        given: The tensors to be loaded into them.
    """
    for kind, names in (
        ("lacks", expected.keys() - given.keys()),
        ("has no place for", given.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            who = "The adapter file" if kind == "lacks" else "The model"
            raise ValueError(f"{who} {kind} the tensor {min(names)}{more}; is it an adapter of this model and config?")
    for name, tensor in given.items():
        if expected[name].numel() and tensor.shape != expected[name].shape:  # ZeRO-3 empties what it has sharded
            raise ValueError(
                f"The tensor {name} has the shape {tuple(tensor.shape)}, but the model needs "
                f"{tuple(expected[name].shape)}; is it an adapter of this model and config?"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"The tensor {name} is not finite floating point: the adapter file is broken.")
