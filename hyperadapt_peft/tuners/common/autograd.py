"""Autograd functions whose call costs no more than what they compute."""

from __future__ import annotations

from typing import Any

import torch


class Function(torch.autograd.Function):
    """torch's, for functions with `setup_context` that are called with all their arguments.

    Torch binds these to the signature of `forward` at each call, for defaults: half of a small layer's time in training.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
