"""SURM, structured unrestricted-rank matrices (arXiv 2406.17740), as a PEFT method."""

from ...integrations.peft import register_peft_type
from .config import SurmConfig
from .layer import SurmLayer
from .model import SurmModel


register_peft_type("surm", SurmConfig, SurmModel, SurmLayer)

__all__ = ["SurmConfig", "SurmLayer", "SurmModel"]
