"""`python -m tests.golden`: make the golden adapters of the current file format, those that are not there yet."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from hyperadapt_peft.tuners.common.config import FORMAT_VERSION

from .adapters import CONFIGS, DIRECTORY, EXPECTED, Base, inputs, sines


@torch.no_grad()
def make(directory: Path, name: str) -> None:
    """Save an adapter with values away from the identity, and the outputs of the model with it."""
    model = get_peft_model(Base(), CONFIGS[name]()).eval()
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.5 * sines(index, *parameter.shape)
    model.save_pretrained(str(directory))
    (directory / "README.md").unlink()
    save_file({"logits": model(inputs())}, directory / EXPECTED)


def main() -> None:
    for name in CONFIGS:
        directory = DIRECTORY / f"v{FORMAT_VERSION}" / name
        if not directory.exists():
            make(directory, name)


if __name__ == "__main__":
    main()
