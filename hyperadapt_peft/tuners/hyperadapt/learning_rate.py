"""Tell a user whose optimizer has a learning rate for weights, at which scales stand still."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .layer import SCALES


# Adam moves every number by about its rate, whatever the gradient's size. Scales start at 1 and need some 0.1: below this
# rate most of a run is spent on the way (the sweep in benchmarks/results/text_classification).
SLOW_LEARNING_RATE = 1e-3


def warn_of_slow_rates() -> None:
    """Look at each optimizer of the Adam family at its first step, and warn if it trains scales at too low a rate.

    Neither PEFT nor the Trainer asks a tuner about the optimizer, but torch tells everybody of its steps. An
    optimizer that holds flattened parameters in the scales' place (ZeRO, some of FSDP1) is not recognised.
    """
    seen: WeakSet[Optimizer] = WeakSet()

    def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in seen:
            return
        seen.add(optimizer)
        if "adam" not in type(optimizer).__name__.lower():
            return
        scales = {id(scale.weight) for scale in SCALES}
        rates = [_peak_rate(group) for group in optimizer.param_groups if scales & set(map(id, group["params"]))]
        if rates and max(rates) < SLOW_LEARNING_RATE:
            warnings.warn(
                f"HyperAdapt's scales hardly move at a learning rate of {max(rates):g}, which suits weights; start from "
                "5e-3."
            )

    register_optimizer_step_pre_hook(look)


def _peak_rate(group: dict[str, Any]) -> float:
    """Return the rate that a schedule's warm-up leads to."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
