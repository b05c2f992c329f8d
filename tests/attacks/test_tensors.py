"""Files whose tensors are not what the model and the config ask for."""

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from safetensors.torch import save_file

from ..tiny import build
from .attack import (
    CONFIGS,
    ENTRIES,
    NOT_HOTSWAP,
    Attack,
    Attacks,
    check_refused,
    edit_config,
    read_tensors,
    save_good,
    tensors,
    untouched,
    weights,
)


attacks = Attacks()
# transformers' own `load_adapter` casts what it reads to the model's dtype, and finite numbers are an adapter
BEFORE_CASTING = tuple(entry for entry in ENTRIES if "native" not in entry)
SHOWN = tuple(entry for entry in NOT_HOTSWAP if entry != "low_cpu_mem_usage")  # which leaves tensors without values
WITH_HEAD = {"modules_to_save": ["lm_head"]}


@attacks(ValueError, "lacks the tensor .* and 1 more|lacks the tensor")
def a_tensor_is_missing(adapter):
    with tensors(adapter) as state:
        del state[min(state)]


@attacks(ValueError, "lacks the tensor .* and .* more")
def all_tensors_are_missing(adapter):
    with tensors(adapter) as state:
        state.clear()


@attacks(ValueError, "has no place for the tensor .*extra")
def a_tensor_of_no_module(adapter):
    with tensors(adapter) as state:
        state["extra"] = torch.ones(3)


@attacks(ValueError, "has no place for the tensor .*layers.7")
def a_tensor_of_a_layer_that_is_not_there(adapter):
    with tensors(adapter) as state:
        key = min(state)
        state[key.replace("layers.0", "layers.7")] = state[key].clone()


@attacks(ValueError, "lacks the tensor")
def a_renamed_tensor(adapter):
    with tensors(adapter) as state:
        state[min(state) + "_"] = state.pop(min(state))


@attacks(ValueError, "has no place for the tensor .*norm.weight")
def a_base_weight_in_the_file(adapter):
    with tensors(adapter) as state:
        state["base_model.model.model.norm.weight"] = torch.zeros(32)


@attacks(ValueError, "has no place for the tensor .*q_proj.*weight")
def the_weight_of_an_adapted_layer_in_the_file(adapter):
    with tensors(adapter) as state:
        state["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"] = torch.zeros(32, 32)


@attacks(
    ValueError, "has no place for the tensor .*first.weight", entries=("load_adapter", "native_second", "hotswap")
)
def another_adapter_s_tensor(adapter):
    with tensors(adapter) as state:
        key = min(state)
        state[key.replace(".weight", ".first.weight")] = state[key].clone()


@attacks(ValueError, "is not finite|no place", entries=NOT_HOTSWAP)
def embeddings_that_are_not_finite(adapter):
    with tensors(adapter) as state:
        state["base_model.model.model.embed_tokens.weight"] = torch.full((64, 32), torch.nan)


@attacks(RuntimeError, "size mismatch.*embed_tokens|ignore_mismatched_sizes", entries=NOT_HOTSWAP)
def embeddings_of_another_vocabulary(adapter):
    with tensors(adapter) as state:
        state["base_model.model.model.embed_tokens.weight"] = torch.zeros(65, 32)


@attacks(RuntimeError, r"size mismatch.*\(7,\)|ignore_mismatched_sizes")
def another_shape(adapter):
    with tensors(adapter) as state:
        state[max(state)] = torch.zeros(7)


@attacks(RuntimeError, r"size mismatch.*|ignore_mismatched_sizes")
def one_dimension_more(adapter):
    with tensors(adapter) as state:
        state[max(state)] = state[max(state)][None].clone()


@attacks(RuntimeError, r"size mismatch.*\(0,\)|ignore_mismatched_sizes")
def no_elements(adapter):
    with tensors(adapter) as state:
        state[max(state)] = torch.zeros(0)


@attacks(RuntimeError, r"size mismatch.*\(\)|ignore_mismatched_sizes")
def a_scalar(adapter):
    with tensors(adapter) as state:
        state[max(state)] = torch.tensor(1.0)


@attacks(ValueError, "is not finite")
def one_nan(adapter):
    with tensors(adapter) as state:
        state[max(state)].view(-1)[-1] = torch.nan


@attacks(ValueError, "is not finite")
def infinite(adapter):
    with tensors(adapter) as state:
        state[min(state)].view(-1)[0] = -torch.inf


@attacks(ValueError, "is not finite")
def finite_until_it_is_rounded_to_the_model_s_dtype(adapter):
    with tensors(adapter) as state:
        state[min(state)] = state[min(state)].double().fill_(1e300)


@attacks(ValueError, "is not finite floating point", entries=BEFORE_CASTING)
def integers(adapter):
    with tensors(adapter) as state:
        state[max(state)] = state[max(state)].to(torch.int64)


@attacks(ValueError, "is not finite floating point", entries=BEFORE_CASTING)
def booleans(adapter):
    with tensors(adapter) as state:
        state[max(state)] = state[max(state)] > 0


@attacks(ValueError, "is not finite floating point", entries=BEFORE_CASTING)
def complex_numbers(adapter):
    with tensors(adapter) as state:
        state[max(state)] = state[max(state)].to(torch.complex64)


@attacks(ValueError, "is not finite floating point", entries=BEFORE_CASTING)
def floats_of_8_bits(adapter):
    with tensors(adapter) as state:
        state[max(state)] = state[max(state)].to(torch.float8_e4m3fn)


@attacks(ValueError, "lacks the tensor")
def lora_s_tensors(adapter):
    get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter / "lora")
    save_file(read_tensors(adapter / "lora"), weights(adapter))


@attacks(ValueError, "lacks the tensor|has no place")
def another_architecture_s_tensors(adapter):
    method = "surm" if "surm" in str(min(read_tensors(adapter))) else "hyperadapt"
    get_peft_model(build("bert")[0], CONFIGS[method]()).save_pretrained(adapter / "bert")
    save_file(read_tensors(adapter / "bert"), weights(adapter))


@attacks((ValueError, KeyError), "lm_head", entries=SHOWN, unread=True)
def a_saved_module_that_is_not_in_the_file(adapter):
    edit_config(adapter, **WITH_HEAD)


@attacks((ValueError, KeyError), "embed_tokens", entries=SHOWN, unread=True)
def trained_tokens_that_are_not_in_the_file(adapter):
    edit_config(adapter, trainable_token_indices=[1, 2])


@attacks.cases()
def test_refused(attack, entry, good, bad):
    check_refused(attack, entry, good, bad)


@pytest.mark.parametrize("entry", NOT_HOTSWAP)
@pytest.mark.parametrize(
    "value, error, says", [(torch.nan, ValueError, "not finite"), (None, RuntimeError, "mismatch")]
)
def test_saved_modules_are_checked_too(tmp_path, entry, value, error, says):
    for name in ("good", "bad"):
        save_good("hyperadapt", tmp_path / name, **WITH_HEAD)

    def spoil(adapter):
        with tensors(adapter) as state:
            key = next(key for key in state if "lm_head" in key)
            state[key] = torch.zeros(3, 3) if value is None else state[key].fill_(value)

    check_refused(Attack(spoil, error, says, ()), entry, tmp_path / "good", tmp_path / "bad")


@pytest.mark.parametrize("beside", ["nothing", "lora"])
def test_mixed_models_too(good, bad, beside):
    a_tensor_is_missing(bad)
    model = build("llama")[0]
    if beside == "nothing":
        with untouched(model), pytest.raises(ValueError, match="lacks the tensor"):
            PeftMixedModel.from_pretrained(model, bad)
        return
    mixed = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), mixed=True
    )
    mixed.eval()
    with untouched(mixed), pytest.raises(ValueError, match="lacks the tensor"):
        mixed.load_adapter(bad, "second")
    mixed.load_adapter(good, "second")
    assert list(mixed.peft_config) == ["default", "second"]
