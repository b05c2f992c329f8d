"""Checks of what is loaded into an adapter, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig


# Fields that say where an adapter came from or what a run does with it, not what it computes.
IRRELEVANT_FIELDS = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "init_weights", "peft_version", "auto_mapping"}
)


def config_differences(old: PeftConfig, new: PeftConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two adapters compute differently, with the values of both."""
    others = new.to_dict()
    return {
        key: (value, others.get(key))
        for key, value in old.to_dict().items()
        if key not in IRRELEVANT_FIELDS and others.get(key) != value
    }


def check_tensors(
    expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], ignore_mismatched_sizes: bool = False
) -> None:
    """Check that `given` has the names and shapes of `expected` and is finite.

    Args:
        expected: The adapter's tensors in the model.
        given: The tensors to be loaded into them.
        ignore_mismatched_sizes: PEFT's option: tensors of another shape will be left out of the loading.

    Raises:
        RuntimeError: A tensor has another shape; the message names it.
        ValueError: A tensor is missing, has no place or is not finite; the message names it.
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
        # ZeRO-3 empties what it has sharded
        if expected[name].numel() and tensor.shape != expected[name].shape and not ignore_mismatched_sizes:
            raise RuntimeError(  # as torch's load_state_dict, but before it has copied the tensors that fit
                f"size mismatch for {name}: its shape is {tuple(tensor.shape)}, but the model needs "
                f"{tuple(expected[name].shape)}; is it an adapter of this model and config?"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"The tensor {name} is not finite floating point: the adapter file is broken.")
