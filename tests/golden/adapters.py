"""The model, the inputs and the kinds of the golden adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


DIRECTORY = Path(__file__).parent
EXPECTED = "expected.safetensors"
LINEAR = ["first", "second"]
EVERY = ["embedding", "conv", "image", *LINEAR]
CONFIGS = {
    "hyperadapt": lambda: HyperAdaptConfig(target_modules=EVERY, alpha=2.0),
    "hyperadapt-row": lambda: HyperAdaptConfig(target_modules=EVERY, sides="row", alpha=2.0),
    "hyperadapt-column": lambda: HyperAdaptConfig(target_modules=EVERY, sides="column", alpha=-0.5),
    "hyperadapt-and-more": lambda: HyperAdaptConfig(
        target_modules=LINEAR,
        modules_to_save=["head"],
        bias="all",
        trainable_token_indices={"embedding": [2, 5]},
        alpha=2.0,
    ),
    "surm-circulant": lambda: SurmConfig(target_modules=LINEAR, structure="circulant", alpha=0.5),
    "surm-toeplitz": lambda: SurmConfig(target_modules=LINEAR, structure="toeplitz"),
    "surm-toeplitz-general": lambda: SurmConfig(target_modules=LINEAR, structure="toeplitz", symmetric=False),
    "surm-kronecker": lambda: SurmConfig(target_modules=LINEAR, structure="kronecker"),
    "surm-ldr": lambda: SurmConfig(target_modules=LINEAR, structure="ldr", r=2),
    "surm-adapter": lambda: SurmConfig(target_modules=LINEAR, structure="circulant", placement="sequential"),
}


class Base(nn.Module):
    """One layer of each kind. Its weights and inputs are sines, the same on every machine and in every torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.image = nn.Conv2d(4, 4, (3, 1), groups=2)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 5, bias=False)
        self.head = nn.Linear(5, 3)
        for index, parameter in enumerate(self.parameters(), start=1):
            parameter.data = sines(index, *parameter.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(x).mT)  # (batch, 8, 6)
        x = self.image(x.unflatten(1, (4, 2)).mT)  # (batch, 4, 4, 2)
        return self.head(self.second(torch.relu(self.first(x.flatten(2)))))


def sines(seed: int, *shape: int) -> torch.Tensor:
    return torch.sin(seed + 1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().reshape(shape)


def inputs() -> torch.Tensor:
    """Two samples of six tokens."""
    return torch.tensor([[0, 1, 2, 3, 4, 5], [6, 5, 2, 2, 1, 0]])
