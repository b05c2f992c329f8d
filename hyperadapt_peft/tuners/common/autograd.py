"""Autograd functions whose call costs no more than what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers


class Function(torch.autograd.Function):
    """torch's, for functions with `setup_context` that are called with all their arguments.

    Torch binds these to the signature of `forward` at each call, for defaults: a third of a small layer's step.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        args = unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
