"""Adapters found by name in a directory, through vLLM's own interface for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

from peft.utils import CONFIG_NAME
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver


class HyperAdaptResolver(LoRAResolver):
    """Finds the HyperAdapt adapter that a request names, in the directory where vLLM finds LoRA's.

    Args:
        directory (`str`): It has a directory that `save_pretrained` wrote for each name.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Optional[LoRARequest]:
        path = self.directory / lora_name
        if ".." in Path(lora_name).parts or not path.is_relative_to(self.directory):  # names come from clients
            return None
        try:
            config = json.loads((path / CONFIG_NAME).read_text())
        except (OSError, ValueError):
            return None
        if (config["peft_type"], config["base_model_name_or_path"]) != ("HYPERADAPT", base_model_name):
            return None
        return LoRARequest(lora_name, 1, str(path))  # vLLM gives it a number of its own
