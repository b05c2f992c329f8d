"""Autograd functions whose call costs no more than what they compute."""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class Function(torch.autograd.Function):
    """torch's, for functions with `setup_context` that are called with all their arguments.

    Torch binds the arguments of such functions to a signature at each call, for defaults: a third of a small layer's step.
    It does not where `forward` has the context, as it has here outside of `torch.func`'s transforms.
    """

    _plain: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls) -> None:
        class Plain(torch.autograd.Function):
            backward = staticmethod(cls.backward)

            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = cls.forward(*args)
                cls.setup_context(ctx, args, output)
                return output

        Plain.__name__ = cls.__name__
        cls._plain = Plain

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return cls._plain.apply(*args)
