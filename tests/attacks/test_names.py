"""Adapter names, which become modules' and directories' names."""

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from ..tiny import build
from .attack import CONFIGS, bare, untouched, with_native, with_peft


OUTSIDE = ["../outside", "..", "../../etc", "/tmp/outside", "a/b", "a\\b", "C:outside", "a\0b"]
NO_NAMES = ["", ".", "a.b", "base_model.model", "__base__", "keys", "type", "training"]
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
    for name in [*OUTSIDE, *NO_NAMES, *WRONG_TYPES]:
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
