"""What the tuners of this package share: targeting, exact merging, refusals."""

from .config import TargetConfig
from .layer import AdapterWeight, TargetLayer
from .model import TargetModel


__all__ = ["AdapterWeight", "TargetConfig", "TargetLayer", "TargetModel"]
