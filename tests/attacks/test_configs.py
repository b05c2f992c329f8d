"""Configs with fields of the wrong type or value, and files that are no configs."""

import dataclasses
import json

import pytest
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ..tiny import build
from .attack import ENTRIES, Attacks, check_refused, edit_config, save_good, tensors, untouched


attacks = Attacks()

# Field -> what cannot be its value. Every field of both configs is here, but `peft_type`, by which PEFT finds the config.
WRONG = {
    "task_type": ["CAUSAL", 1, [], {}, True],
    "auto_mapping": ["transformers", 1, [], True],
    "peft_version": [1, 0.21, [], {}, True],
    "base_model_name_or_path": [1, [], {}, False],
    "revision": [1, ["main"], {}, False],
    "inference_mode": ["yes", 1, None, [], {}],
    "target_modules": [1, 1.5, {}, True, [1], [["q_proj"]], [None], [""], "", "(", "*", "(?P<a>x)(?P<a>y)"],
    "exclude_modules": [1, 1.5, {}, True, [1], [None], [""], "[", "a{9999999999999}"],
    "init_weights": ["gaussian", 0, 1, None, [], {}],
    "bias": ["lora_only", "ALL", "", 1, None, [], {}, True],
    "modules_to_save": ["lm_head", 1, {}, True, [1], [None], [""], ["("]],
    "layers_to_transform": ["0", 1.0, {}, True, [True], ["0"], [[0]], -1, [0, -1], 2**31],
    "layers_pattern": [1, {}, True, [1], [None], ["("], [""]],
    "trainable_token_indices": ["0", 1, [], {"embed_tokens": 1}, {"embed_tokens": []}, {"embed_tokens": None}, 1.0, True, [True], [[1]], [-1], [2**70], {"embed_tokens": "1"}, {"embed_tokens": [-1]}],
    "format_version": ["1", 1.0, 0, -1, 2**31, True, [], {}],
    "target_parameters": ["down_proj", 1, {}, True, [1], [None]],
    "save_memory": ["yes", 0, 1, None, [], {}],
    "sides": ["rows", "", 1, None, ["row"], {}, True],
    "structure": ["hankel", "", 1, None, ["ldr"], {}, True],
    "placement": ["parallel ", 1, None, [], {}, True],
    "r": [0, -1, 1.0, "8", None, True, [], {}, float("nan")],
    "symmetric": [0, 1, "yes", None, [], {}],
    "alpha": ["1", None, True, [], {}, float("nan"), float("inf"), -float("inf"), 1e39, 10**400],
    "surm_dropout": ["0", None, True, 1, 1.5, -0.1, [], {}, float("nan")],
}  # fmt: skip
FIELDS = [
    (config_cls, field.name)
    for config_cls in (HyperAdaptConfig, SurmConfig)
    for field in dataclasses.fields(config_cls)
    if field.name != "peft_type"
]


@pytest.mark.parametrize("config_cls, field", FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_wrong_value_is_named(tmp_path, config_cls, field):
    """Made in Python, read by PEFT, or read and loaded: one error, which names the field."""
    save_good("surm" if config_cls is SurmConfig else "hyperadapt", tmp_path)
    said = field.replace("_", "[ _]")  # PEFT itself says "Invalid task type"
    wrong = [
        value for value in WRONG[field] if (config_cls, field, value) != (SurmConfig, "alpha", None)
    ]  # the structure's
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=said):
            config_cls(**{field: value})
        edit_config(tmp_path, **{field: value})
        with pytest.raises((TypeError, ValueError), match=said):
            PeftConfig.from_pretrained(tmp_path)
    model = build("llama")[0]
    for entry in ("from_pretrained", "native"):
        with untouched(model), pytest.raises((TypeError, ValueError), match=said):
            ENTRIES[entry].load(model, tmp_path)


def write_config(adapter, text):
    (adapter / "adapter_config.json").write_text(text)


def replaced(adapter, old, new):
    file = adapter / "adapter_config.json"
    assert old in file.read_text()
    write_config(adapter, file.read_text().replace(old, new))


@attacks(ValueError, "Expecting value")  # JSONDecodeError is a ValueError
def an_empty_config(adapter):
    write_config(adapter, "")


@attacks(ValueError, "Expecting|Unterminated|Extra data|delimiter")
def a_config_cut_off(adapter):
    file = adapter / "adapter_config.json"
    write_config(adapter, file.read_text()[:-20])


@attacks(ValueError, "Extra data")
def two_configs_in_one_file(adapter):
    write_config(adapter, (adapter / "adapter_config.json").read_text() * 2)


@attacks(ValueError, "codec can't decode")
def a_config_that_is_not_text(adapter):
    (adapter / "adapter_config.json").write_bytes(b'{"peft_type": "\xff\xfe\x80"}')


@attacks(TypeError, "list indices|not a mapping")
def a_list_for_a_config(adapter):
    write_config(adapter, '["HYPERADAPT"]')


@attacks(TypeError, "not iterable|NoneType|argument of type")
def null_for_a_config(adapter):
    write_config(adapter, "null")


@attacks(RecursionError, "recursion")
def a_deeply_nested_config(adapter):
    write_config(adapter, '{"peft_type": "SURM", "auto_mapping": ' + "[" * 10**6 + "]" * 10**6 + "}")


@attacks((KeyError, TypeError), "peft_type")
def a_config_without_a_type(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["peft_type"]
    write_config(adapter, json.dumps(config))


@attacks(KeyError, "^'os.system'$")
def a_type_that_does_not_exist(adapter):
    edit_config(adapter, peft_type="os.system")


@attacks((TypeError, KeyError), "unhashable|peft_type")
def a_type_that_is_a_list(adapter):
    edit_config(adapter, peft_type=["SURM"])


@attacks(ValueError, "not found in the base model|No modules")
def targets_that_are_not_there(adapter):
    edit_config(adapter, target_modules=["c_attn"])


@attacks(ValueError, "not supported")
def a_target_of_a_kind_that_cannot_be_adapted(adapter):
    edit_config(adapter, target_modules=["q_proj", "input_layernorm"])


@attacks(ValueError, "not supported|not found")
def the_whole_model_as_a_target(adapter):
    edit_config(adapter, target_modules=".*")


@attacks(ValueError, "excluded|targeted")
def everything_excluded(adapter):
    edit_config(adapter, exclude_modules=".*")


@attacks(ValueError, "excluded|targeted|not found|No modules")
def the_whole_model_as_a_saved_module(adapter):
    edit_config(adapter, modules_to_save=["model"])


@attacks(ValueError, "not found|target")
def layers_that_are_not_there(adapter):
    edit_config(adapter, target_modules=["q_proj"], layers_to_transform=[7, 8])


@attacks(ValueError, "trainable_token_indices|not found")
def a_token_beyond_the_vocabulary(adapter):
    edit_config(adapter, trainable_token_indices=[1, 64])


@attacks(ValueError, "nowhere")
def tokens_of_an_embedding_that_is_not_there(adapter):
    edit_config(adapter, trainable_token_indices={"nowhere": [1]})


@attacks((ValueError, RuntimeError), "lacks the tensor|has no place|size mismatch|ignore_mismatched")
def a_config_of_other_shapes(adapter):
    """The config says one thing, the tensors are another."""
    surm = "SURM" in (adapter / "adapter_config.json").read_text()
    edit_config(adapter, **({"structure": "kronecker"} if surm else {"sides": "row"}))


@attacks((ValueError, RuntimeError), "lacks the tensor|different peft types|size mismatch|ignore_mismatched")
def another_method_s_type(adapter):
    """HyperAdapt's tensors under SURM's name, and the other way round."""
    surm = "SURM" in (adapter / "adapter_config.json").read_text()
    edit_config(adapter, peft_type="HYPERADAPT" if surm else "SURM")


@attacks((ValueError, TypeError), "target_modules")
def a_field_given_twice(adapter):
    """JSON takes the last one, and it is the last one that is checked."""
    write_config(adapter, (adapter / "adapter_config.json").read_text().rstrip()[:-1] + ', "target_modules": 3}')


@attacks.cases(but=("low_cpu_mem_usage", "native_second"))  # they differ after the files are read
def test_refused(attack, entry, good, bad):
    check_refused(attack, entry, good, bad)


# ----------------------------------------------------------------------------------------------------------------------
# What is not refused, because it does nothing
# ----------------------------------------------------------------------------------------------------------------------


def test_unknown_keys_are_dropped_with_a_warning(bad):
    """PEFT's rule, so that older versions read newer files."""
    edit_config(bad, __class__="os.system", on_load="__import__('os').abort()", _modules={})
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['__class__', '_modules', 'on_load'\]"):
        config = PeftConfig.from_pretrained(bad)
    assert type(config) in (HyperAdaptConfig, SurmConfig)
    assert not hasattr(config, "on_load")


def test_runtime_settings_in_a_file_are_dropped(bad):
    edit_config(bad, runtime_config={"ephemeral_gpu_offload": True})
    with pytest.warns(UserWarning, match="runtime_config"):
        assert not hasattr(PeftConfig.from_pretrained(bad), "runtime_config")


def test_a_thousand_targets(good, bad):
    """Names that match nothing do nothing."""
    config = json.loads((bad / "adapter_config.json").read_text())
    edit_config(bad, target_modules=[*config["target_modules"], *(f"m{i}" for i in range(1000))])
    model = PeftModel.from_pretrained(build("llama")[0], bad)
    found = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    expected = PeftModel.from_pretrained(build("llama")[0], good)
    assert found == [name for name, module in expected.named_modules() if isinstance(module, BaseTunerLayer)]


def test_huge_finite_values_load(bad):
    """Any number is an adapter; that the outputs are useless can be seen by looking at them."""
    with tensors(bad) as state:
        state[min(state)].fill_(1e30)
    PeftModel.from_pretrained(build("llama")[0], bad)
