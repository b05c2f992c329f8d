"""Where autograd functions of our own give way to plain operations."""

import torch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Return whether a transform of `torch.func` runs, or forward-mode differentiation.

    These can do all with plain operations: batch them, and differentiate them forwards, backwards and repeatedly. Of an
    autograd function they ask for rules of its own, and for a call that takes twice as long elsewhere too.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
