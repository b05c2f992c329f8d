"""HyperAdapt and SURM for PEFT. Importing this package registers both methods with PEFT."""

from .adapters.conversion import lora_energy
from .adapters.hotswap import hotswap_adapter
from .adapters.inspection import inspect_adapter
from .adapters.loading import load_adapters
from .integrations.hub import keep_usage
from .integrations.transformers import check_loading
from .tuners.hyperadapt import HyperAdaptConfig, HyperAdaptModel
from .tuners.surm import SurmConfig, SurmModel
from .version import __version__


check_loading()
keep_usage()

__all__ = [
    "HyperAdaptConfig",
    "HyperAdaptModel",
    "SurmConfig",
    "SurmModel",
    "__version__",
    "hotswap_adapter",
    "inspect_adapter",
    "load_adapters",
    "lora_energy",
]
