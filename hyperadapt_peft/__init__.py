"""HyperAdapt and SURM for PEFT. Importing this package registers both methods with PEFT."""

from .base.loading import guard_loading
from .card import keep_usage
from .hyperadapt import HyperAdaptConfig, HyperAdaptModel
from .hyperadapt.learning_rate import warn_of_slow_rates
from .saving import save_whole
from .surm import SurmConfig, SurmModel
from .version import __version__


guard_loading()
keep_usage()
save_whole()
warn_of_slow_rates()

__all__ = ["HyperAdaptConfig", "HyperAdaptModel", "SurmConfig", "SurmModel", "__version__"]
