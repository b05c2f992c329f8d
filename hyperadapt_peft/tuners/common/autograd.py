"""Where autograd functions of our own give way to plain operations."""

import torch


def in_transform() -> bool:
    """Return whether a transform of `torch.func` runs.

    Transforms can do all with plain operations: batch them, and differentiate them forwards, backwards and repeatedly. Of
    an autograd function they ask for rules of its own, and for a call that takes twice as long elsewhere too.
    """
    return torch._C._are_functorch_transforms_active()
