"""Houlsby's bottleneck adapter as a PEFT method, `BOTTLENECK`: what SURM's adapter is measured against.

`Y = X + gelu(X D + d) U + u` after each block output, D (out, r) random, U (r, out), u and d zero: the identity at
start. Source: Houlsby et al. 2019, arXiv 1902.00751. Only what the comparison needs: no merging, one active adapter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hyperadapt_peft.integrations.peft import add_peft_type, register_peft_type
from hyperadapt_peft.tuners.common import TargetConfig, TargetLayer, TargetModel
from hyperadapt_peft.tuners.surm import SurmModel


@dataclass
class BottleneckConfig(TargetConfig):
    """`r` is the width of the bottleneck."""

    r: int = 48
    placement: str = "sequential"  # read by SurmModel.default_targets

    def __post_init__(self):
        self.peft_type = add_peft_type("BOTTLENECK")
        super().__post_init__()


class Linear(TargetLayer):
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        down, up = nn.Linear(self.out_features, config.r), nn.Linear(config.r, self.out_features)
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                hidden = nn.functional.gelu(self.bottleneck_down[name](result))
                result = result + self.bottleneck_up[name](hidden).to(result.dtype)
        return result


class BottleneckModel(TargetModel):
    prefix = "bottleneck_"
    tuner_layer_cls = Linear
    layer_classes = {nn.Linear: Linear}  # noqa: RUF012
    supported_layers = "`torch.nn.Linear`"
    default_targets = SurmModel.default_targets


register_peft_type("bottleneck", BottleneckConfig, BottleneckModel, Linear)
