"""Adapters saved by earlier versions load, and give the outputs they gave then."""

import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from hyperadapt_peft.tuners.common.config import FORMAT_VERSION

from .adapters import CONFIGS, DIRECTORY, EXPECTED, Base, inputs


ADAPTERS = sorted(DIRECTORY.glob("v*/*"))


def test_there_are_some_of_every_version():
    versions = {f"v{version}" for version in range(1, FORMAT_VERSION + 1)}
    assert {path.parent.name for path in ADAPTERS} == versions
    assert {path.name for path in ADAPTERS if path.parent.name == f"v{FORMAT_VERSION}"} == set(CONFIGS)


@torch.no_grad()
@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_outputs_are_what_they_were(path):
    base = Base().eval()(inputs())
    logits = PeftModel.from_pretrained(Base(), path).eval()(inputs())
    expected = load_file(path / EXPECTED)["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - base).abs().max() > 0.01
    assert json.loads((path / "adapter_config.json").read_text())["format_version"] == int(path.parent.name[1:])


@pytest.mark.parametrize(
    "version, message",
    [
        (FORMAT_VERSION + 1, f"reads versions up to {FORMAT_VERSION}. Install a newer one"),
        ("1", "must be a positive int, not '1'"),
        (0, "must be a positive int, not 0"),
        (True, "must be a positive int, not True"),
    ],
)
def test_a_version_this_code_does_not_know_is_refused(tmp_path, version, message):
    shutil.copytree(ADAPTERS[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "format_version": version, "unheard_of": 1}))
    model = Base()
    with pytest.raises((TypeError, ValueError), match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.state_dict()) == list(Base().state_dict())


def test_a_file_from_before_the_field_is_of_version_1(tmp_path):
    shutil.copytree(DIRECTORY / "v1" / "hyperadapt", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["format_version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert PeftConfig.from_pretrained(tmp_path).alpha == 1


def test_version_1_is_alpha_1_and_is_saved_as_the_current_version(tmp_path):
    path = DIRECTORY / "v1" / "hyperadapt"
    model = PeftModel.from_pretrained(Base(), path).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["format_version"], config["alpha"]) == (FORMAT_VERSION, 1)
    again = PeftModel.from_pretrained(Base(), tmp_path).eval()
    assert torch.equal(again(inputs()), model(inputs()))
