"""HyperAdapt (arXiv 2509.18629) as a PEFT method."""

from ...integrations.peft import register_peft_type
from .config import HyperAdaptConfig
from .layer import HyperAdaptLayer
from .model import HyperAdaptModel


register_peft_type("hyperadapt", HyperAdaptConfig, HyperAdaptModel, HyperAdaptLayer)

__all__ = ["HyperAdaptConfig", "HyperAdaptLayer", "HyperAdaptModel"]
