"""Broken adapter files are refused by a message that names the tensor, before anything is loaded."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ..tiny import build


def absent(name):
    """The name of a tensor of a module that is not there."""
    return ".".join(["base_model.model.absent", *name.split(".")[-2:]])


BROKEN = {
    "lacks the tensor {key}": lambda tensors, name: tensors.pop(name),
    "has no place for the tensor": lambda tensors, name: tensors.update({absent(name): tensors[name].clone()}),
    "size mismatch for {key}: its shape is (7,)": lambda tensors, name: tensors.update({name: torch.zeros(7)}),
    "{key} is not finite": lambda tensors, name: tensors[name].fill_(float("nan")),
    "{key} is not finite floating": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}),
}


@torch.no_grad()
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("config", [HyperAdaptConfig, SurmConfig])
@pytest.mark.parametrize("message", BROKEN)
def test_broken_files(tmp_path, config, message, low_cpu_mem_usage):
    model = get_peft_model(build("llama")[0], config())
    for p in model.parameters():
        if p.requires_grad:
            p.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = max(tensors)
    BROKEN[message](tensors, name)
    save_file(tensors, file)
    base, batch, _ = build("llama")
    expected = base(**batch).logits
    message = re.escape(message.format(key=name.replace(".weight", ".default.weight")))
    with pytest.raises((RuntimeError, ValueError), match=message):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(base(**batch).logits, expected)
