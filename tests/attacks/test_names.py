"""Adapter names, which become modules' and directories' names."""

from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..tiny import build
from .attack import CONFIGS, bare, untouched, with_native, with_peft


OUTSIDE = ["../outside", "..", "../../etc", "/tmp/outside", "a/b", "a\\b", "C:outside", "a\0b"]
NO_NAMES = ["", ".", "a.b", "base_model.model", "__base__", "keys", "type", "training", "persistent", "_keys"]
# Of Llama's modules and parameters, at any depth, and of what PEFT puts around them.
TAKEN = [
    "weight",
    "base_layer",
    "original_module",
    "modules_to_save",
    "token_adapter",
]
WRONG_TYPES = [1, b"a", ["a"], True]
CALLS = {
    "get_peft_model": (bare, lambda model, path, name: get_peft_model(model, CONFIGS[path.name](), adapter_name=name)),
    "from_pretrained": (bare, lambda model, path, name: PeftModel.from_pretrained(model, path, adapter_name=name)),
    "load_adapter": (with_peft, lambda model, path, name: model.load_adapter(path, name)),
    "add_adapter": (with_peft, lambda model, path, name: model.add_adapter(name, CONFIGS[path.name]())),
    "native": (with_native, lambda model, path, name: model.load_adapter(str(path), adapter_name=name)),
}


@pytest.mark.parametrize("call", CALLS)
def test_names_that_are_not_names(good, call):
    prepare, load = CALLS[call]
    model = prepare(good)
    for name in [*OUTSIDE, *NO_NAMES, *TAKEN, *WRONG_TYPES]:
        if call == "native" and name in ("", None):
            continue  # transformers means "default" by it
        error = ValueError if isinstance(name, str) else TypeError
        with untouched(model), pytest.raises(error, match="cannot be called|adapter_name|unhashable|requires string"):
            load(model, good, name)


def test_new_names_of_combinations():
    layers = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(layers, CONFIGS["hyperadapt"](target_modules=["0"]))
    for name in OUTSIDE:
        with pytest.raises(ValueError, match="cannot be called"):
            model.add_weighted_adapter(["default"], [1.0], name)
        with pytest.raises(ValueError, match="cannot be called"):
            model.invert_adapter("default", name)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["a", "A-1_b", "naïve", "名前", "with space", "default", "x" * 200])
def test_good_names(good, tmp_path, name):
    """They are saved inside the directory, and load again."""
    PeftModel.from_pretrained(build("llama")[0], good, adapter_name=name).save_pretrained(tmp_path / "out")
    directory = tmp_path / "out" if name == "default" else tmp_path / "out" / name
    assert (directory / "adapter_model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    PeftModel.from_pretrained(build("llama")[0], directory, adapter_name=name)


class Head(nn.Module):
    """A head with children, a parameter and buffers of its own."""

    def __init__(self):
        super().__init__()
        self.dense, self.out_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.scale * self.out_proj(torch.tanh(self.norm(self.dense(x))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=Head())).eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_names_that_lose_a_tensor_of_a_saved_module_are_refused(method, tmp_path):
    """PEFT takes "head.weight.weight" for the parameter "head.weight", and saves neither or freezes it."""

    def adapted(name):
        return get_peft_model(network(), CONFIGS[method](target_modules=["body"], modules_to_save=["head"]), name)

    x, good = torch.ones(3, 4), adapted("good")
    names = {part for key in good.state_dict() for part in key.split(".")} - {
        "base_model",
        "model",
        "good",
        "body",
        "head",
    }
    assert {"weight", "bias", "dense", "running_mean", "scale", "base_layer", "modules_to_save"} <= names
    for name in names:
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            adapted(name)
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            good.add_adapter(name, CONFIGS[method](target_modules=["body"], modules_to_save=["head"]))
    with torch.no_grad():
        for parameter in good.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    good.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path / "good", adapter_name="other")
    assert torch.equal(loaded(x), good.eval()(x))
