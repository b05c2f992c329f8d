"""The types are first-class PEFT types: enum, tables, reload, threads, mixed models, and when PEFT has changed."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import model as mixed_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, HyperAdaptModel
from hyperadapt_peft.integrations.peft import add_peft_type, register_peft_type
from hyperadapt_peft.tuners.hyperadapt import HyperAdaptLayer


def fresh(code: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)


def test_the_member_is_like_peft_s_own():
    member = PeftType.HYPERADAPT
    assert member is PeftType("HYPERADAPT") is PeftType["HYPERADAPT"] is copy.deepcopy(member)
    assert member in list(PeftType) and len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert (
        member == "HYPERADAPT" and hash(member) == hash("HYPERADAPT") and member.value == member.name == "HYPERADAPT"
    )
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "HYPERADAPT")
    assert json.dumps(member) == '"HYPERADAPT"'
    assert all(pickle.loads(pickle.dumps(member, p)) is member for p in range(pickle.HIGHEST_PROTOCOL + 1))
    with pytest.raises(AttributeError):
        PeftType.HYPERADAPT = "else"


def test_the_tables_know_the_type_by_member_and_by_name():
    for key in (PeftType.HYPERADAPT, "HYPERADAPT"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is HyperAdaptConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is HyperAdaptModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "hyperadapt_"


def test_reload_and_repeated_registration():
    result = fresh(
        """
        import importlib, sys, warnings
        import hyperadapt_peft, torch
        from peft import PeftType, get_peft_model
        member, count = PeftType.HYPERADAPT, len(PeftType)
        warnings.simplefilter("error", UserWarning)
        importlib.reload(hyperadapt_peft)
        for name in [n for n in sys.modules if n.startswith("hyperadapt_peft")]:
            del sys.modules[name]
        import hyperadapt_peft
        from hyperadapt_peft.tuners.hyperadapt import HyperAdaptLayer
        assert PeftType.HYPERADAPT is member and len(PeftType) == count
        for mixed in (False, True):
            model = torch.nn.Sequential(torch.nn.Linear(4, 4))
            config = hyperadapt_peft.HyperAdaptConfig(target_modules=["0"])
            model = get_peft_model(model, config, mixed=mixed)
            assert isinstance(model.base_model.model[0], HyperAdaptLayer)
        """
    )
    assert result.returncode == 0, result.stderr


def test_mixed_models_of_other_methods_take_the_names_that_they_took():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), mixed=True)
    for name in ("team/one", "weight"):
        model.add_adapter(name, LoraConfig(target_modules=["0"]))
    assert list(model.peft_config) == ["default", "team/one", "weight"]


def test_threads_registering_at_once():
    result = fresh(
        """
        import threading
        from concurrent.futures import ThreadPoolExecutor
        from peft import PeftType
        barrier, count = threading.Barrier(8), len(PeftType)
        def load(_):
            barrier.wait()
            import hyperadapt_peft
            from hyperadapt_peft.integrations.peft import add_peft_type
            return hyperadapt_peft.HyperAdaptConfig().peft_type, add_peft_type("ANOTHER")
        with ThreadPoolExecutor(8) as pool:
            pairs = list(pool.map(load, range(8)))
        assert len({id(x) for pair in pairs for x in pair}) == 2, pairs
        assert len(list(PeftType)) == len(set(PeftType))
        """
    )
    assert result.returncode == 0, result.stderr


def test_a_peft_that_ships_the_method_keeps_its_own():
    result = fresh(
        """
        import warnings
        from dataclasses import dataclass
        import peft.mapping as mapping
        from peft import PeftConfig
        @dataclass
        class Theirs(PeftConfig): ...
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING["HYPERADAPT"] = Theirs
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import hyperadapt_peft
        ours = [str(w.message) for w in caught if "HYPERADAPT is already provided by __main__" in str(w.message)]
        assert len(ours) == 1, caught
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["HYPERADAPT"] is Theirs
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("gone", ["PREFIXES", "COMPATIBLE_TUNER_TYPES", "Configs", "Layers"])
def test_mixed_steps_back_when_peft_s_tables_change(gone, monkeypatch):
    monkeypatch.delattr(mixed_model, gone)
    before, prefixes = dict(vars(mixed_model)), list(getattr(mixed_model, "PREFIXES", []))
    with pytest.warns(UserWarning, match="PeftMixedModel of this PEFT cannot take HYPERADAPT"):
        register_peft_type("hyperadapt", HyperAdaptConfig, HyperAdaptModel, HyperAdaptLayer)
    assert dict(vars(mixed_model)) == before
    assert list(getattr(mixed_model, "PREFIXES", [])) == prefixes
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), HyperAdaptConfig())


def test_an_enum_that_cannot_be_extended_says_so():
    result = fresh(
        """
        from types import MappingProxyType
        from peft.utils import PeftType
        type.__setattr__(PeftType, "_value2member_map_", MappingProxyType(PeftType._value2member_map_))
        import hyperadapt_peft
        """
    )
    assert result.returncode != 0
    assert "hyperadapt_peft cannot add HYPERADAPT to PEFT's PeftType" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("order", [("lora", "hyper"), ("hyper", "lora")])
def test_mixed_model_merges_inside_out(order):
    """On one layer the later adapter wraps the earlier; merging keeps that order (the two do not commute)."""
    torch.manual_seed(0)
    configs = {
        "lora": LoraConfig(target_modules=["0"], init_lora_weights=False, r=2),
        "hyper": HyperAdaptConfig(target_modules=["0"], init_weights=False),
    }
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).eval(), configs[order[0]], order[0], mixed=True)
    model.add_adapter(order[1], configs[order[1]])
    model.set_adapter(list(order))
    model.eval()
    x = torch.randn(3, 6)
    expected = model(x)
    assert type(model.base_model.model[0]).__module__.split(".")[0] == (
        "peft" if order[1] == "lora" else "hyperadapt_peft"
    )
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_mixed_model_loads_a_saved_adapter(tmp_path):
    base = nn.Sequential(nn.Linear(6, 5)).eval()
    model = get_peft_model(copy.deepcopy(base), HyperAdaptConfig(target_modules=["0"], init_weights=False))
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(PeftMixedModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


def test_registering_twice_is_quiet(recwarn):
    register_peft_type("hyperadapt", HyperAdaptConfig, HyperAdaptModel, HyperAdaptLayer)
    assert add_peft_type("HYPERADAPT") is PeftType.HYPERADAPT
    assert not recwarn.list


def test_import_is_cheap():
    """The budget is 0.2 s beyond `import peft`; what could break it is a heavy module, so name them, not seconds."""
    result = fresh(
        """
        import sys, peft
        before = set(sys.modules)
        import hyperadapt_peft
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        """
    )
    assert result.stdout.split() == ["hyperadapt_peft"], result


def test_nothing_is_hidden_in_the_install():
    files = importlib.metadata.files("hyperadapt_peft") or []
    assert not [f for f in files if f.suffix == ".pth" and "editable" not in f.name]
