"""Adapters that name code: nothing of it is imported or executed."""

import sys

import pytest
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel

from ..tiny import build
from .attack import ENTRIES, edit_config


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that writes a file when it is imported; returns that file."""
    sign = tmp_path / "sign"
    (tmp_path / "planted_module.py").write_text(f"open({str(sign)!r}, 'w').write('imported')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return sign


NAMES_CODE = {"base_model_class": "Model", "parent_library": "planted_module"}


def test_the_module_works(planted):
    """Else the tests below would prove nothing."""
    import planted_module  # noqa: F401

    assert planted.exists()
    del sys.modules["planted_module"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_loading_into_a_model_imports_nothing(good, bad, planted, entry):
    """`auto_mapping` is read by PEFT's auto classes only; to a model that is there the adapter loads as ever."""
    edit_config(bad, auto_mapping=NAMES_CODE)
    ENTRIES[entry].load(ENTRIES[entry].prepare(good), bad)
    assert not planted.exists()
    assert "planted_module" not in sys.modules


def test_the_auto_class_refuses(bad, planted):
    edit_config(bad, auto_mapping=NAMES_CODE, task_type=None, base_model_name_or_path=str(bad))
    with pytest.raises((ValueError, ImportError), match="planted_module"):
        AutoPeftModel.from_pretrained(bad)
    assert not planted.exists()


def test_the_auto_class_does_not_trust_remote_code(bad, planted):
    """A base model that brings code with it: transformers asks before it executes any, and here nobody answers yes."""
    (bad / "config.json").write_text(
        '{"model_type": "planted", "auto_map": {"AutoConfig": "planted_module.Model", '
        '"AutoModelForCausalLM": "planted_module.Model"}}'
    )
    (bad / "planted_module.py").write_text((planted.parent / "planted_module.py").read_text())
    edit_config(bad, task_type="CAUSAL_LM", base_model_name_or_path=str(bad))
    with pytest.raises((ValueError, OSError), match="trust_remote_code|model type"):
        AutoPeftModelForCausalLM.from_pretrained(bad)
    assert not planted.exists()


def test_names_are_data(bad, planted):
    """Names of modules and fields that look like code are compared with names, and no more."""
    for field in ("target_modules", "modules_to_save"):
        edit_config(bad, **{field: ["__import__('planted_module')", "planted_module"]})
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(build("llama")[0], bad)
    assert not planted.exists()
