"""What the tuners of this package share: targeting, exact merging, refusals."""

from .config import TargetConfig
from .layer import TargetLayer
from .model import TargetModel


__all__ = ["TargetConfig", "TargetLayer", "TargetModel"]
