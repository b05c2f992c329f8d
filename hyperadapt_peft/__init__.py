"""HyperAdapt and SURM for PEFT. Importing this package registers its methods with PEFT."""

from .hyperadapt import HyperAdaptConfig, HyperAdaptModel
from .version import __version__


__all__ = ["HyperAdaptConfig", "HyperAdaptModel", "__version__"]
