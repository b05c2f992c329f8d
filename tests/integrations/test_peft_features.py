"""What PEFT users do with any tuner, done with ours."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.version import INSTALL

from ..tiny import build


@pytest.fixture
def llama():
    return build("llama")


def random_adapter(model, **config):
    return get_peft_model(model, HyperAdaptConfig(task_type="CAUSAL_LM", init_weights=False, **config)).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def saved(llama, tmp_path):
    """A base model and a random adapter of it on disk, with the adapter's outputs."""
    model, batch, _ = llama
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base = logits(model, batch)
    model = random_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, batch, base, logits(model, batch)


def test_transformers_own_adapter_calls(saved):
    path, batch, base, expected = saved
    model = LlamaForCausalLM.from_pretrained(path / "base")
    model.load_adapter(str(path / "adapter"), adapter_name="first")
    assert torch.equal(logits(model, batch), expected)
    model.add_adapter(HyperAdaptConfig(init_weights=False), adapter_name="second")
    model.set_adapter("second")
    second = logits(model, batch)
    assert not torch.equal(second, expected)
    model.save_pretrained(path / "second")
    assert "import hyperadapt_peft" in (path / "second/README.md").read_text()
    model.disable_adapters()
    assert torch.equal(logits(model, batch), base)
    model.enable_adapters()
    model.set_adapter("first")
    assert torch.equal(logits(model, batch), expected)
    model.delete_adapter("first")
    assert not [k for k in model.state_dict() if "first" in k]
    again = LlamaForCausalLM.from_pretrained(path / "base")
    again.load_adapter(str(path / "second"))
    assert torch.equal(logits(again, batch), second)


def test_auto_classes_load_the_adapter_directory(saved):
    path, batch, _, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path / "adapter"), batch), expected)
    assert PeftConfig.from_pretrained(path / "adapter").peft_type.value == "HYPERADAPT"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage(saved, low_cpu_mem_usage):
    path, batch, _, expected = saved
    model = LlamaForCausalLM.from_pretrained(path / "base")
    model = PeftModel.from_pretrained(model, path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(path / "adapter", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), expected)


def test_without_the_import_the_card_has_the_remedy(saved):
    path, *_ = saved
    code = f"import peft; peft.PeftConfig.from_pretrained({str(path / 'adapter')!r})"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "KeyError: 'HYPERADAPT'" in done.stderr
    card = (path / "adapter/README.md").read_text()
    assert "KeyError: 'HYPERADAPT'" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    snippet = snippet.replace('"..."', repr(str(path / "adapter")))
    done = subprocess.run([sys.executable, "-c", snippet], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_card_names_install_base_and_method_and_keeps_what_is_there(saved):
    path, *_ = saved
    card = (path / "adapter/README.md").read_text()
    assert INSTALL in card and str(path / "base") in card and "`HyperAdaptConfig`" in card
    (path / "adapter/README.md").write_text(card + "\nWritten by hand.\n")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(path / "base"), path / "adapter")
    model.save_pretrained(path / "adapter")
    again = (path / "adapter/README.md").read_text()
    assert "Written by hand." in again
    assert again.count("import hyperadapt_peft ") == 1 and again.count("- hyperadapt\n") == 1


def test_what_is_saved_is_the_scales_and_nothing_else(saved):
    path, *_ = saved
    tensors = load_file(path / "adapter/adapter_model.safetensors")
    assert {re.sub(r".*_proj\.", "", key) for key in tensors} == {"hyperadapt_row.weight", "hyperadapt_column.weight"}
    per_layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)  # q, o; k, v; gate, up, down
    assert sum(t.numel() for t in tensors.values()) == 2 * per_layer
    assert json.loads((path / "adapter/adapter_config.json").read_text())["peft_type"] == "HYPERADAPT"


def test_default_targets_are_all_linears_but_the_head(llama):
    model = random_adapter(llama[0])
    assert {name.split(".")[-1] for name in model.targeted_module_names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_targeting_options(llama):
    def targeted(**config):
        return set(get_peft_model(build("llama")[0], HyperAdaptConfig(**config)).targeted_module_names)

    layer = "model.layers.{}.self_attn.q_proj"
    assert targeted(target_modules=["q_proj"]) == {layer.format(0), layer.format(1)}
    assert targeted(target_modules=["q_proj"], layers_to_transform=0) == {layer.format(0)}
    assert targeted(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers") == {layer.format(1)}
    assert targeted(target_modules=r".*\.1\..*q_proj") == {layer.format(1)}
    assert len(targeted(layers_to_transform=[1])) == 7  # counted though the names are the default's
    assert targeted(target_modules="all-linear", exclude_modules=["mlp"]) == targeted()
    assert not any("gate" in key for key in targeted(exclude_modules=["gate_proj"]))
    assert targeted(target_modules=["embed_tokens"]) == {"model.embed_tokens"}


@pytest.mark.parametrize("task_type, head", [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")])
def test_a_new_head_is_trained_whole_for_every_task(task_type, head):
    from transformers import BertForQuestionAnswering, BertForTokenClassification

    cls = BertForTokenClassification if task_type == "TOKEN_CLS" else BertForQuestionAnswering
    model = get_peft_model(cls(build("bert")[0].config), HyperAdaptConfig(task_type=task_type))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".hyperadapt_" not in n}
    assert trained == {f"base_model.model.{head}.modules_to_save.default.{x}" for x in ("weight", "bias")}


def test_modules_to_save_and_trainable_tokens_survive_the_round_trip(tmp_path):
    model, batch, _ = build("llama")
    config = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5, 9]}}
    model = random_adapter(model, **config)
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").mul_(2)
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name:
                p.add_(1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(build("llama")[0], tmp_path).eval()
    assert torch.equal(logits(fresh, batch), expected)
    merged = fresh.merge_and_unload()  # other tuners fail here: they assign to TrainableTokensWrapper.weight
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        logits(random_adapter(build("llama")[0], **config).unload(), batch), logits(build("llama")[0], batch)
    )


def test_several_adapters_switch_and_disable(llama):
    model, batch, _ = llama
    base = logits(model, batch)
    model = random_adapter(model)
    first = logits(model, batch)
    model.add_adapter("second", HyperAdaptConfig(target_modules=["q_proj"], init_weights=False, sides="row"))
    assert torch.equal(logits(model, batch), first)  # adding does not activate
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in n)
    model.set_adapter("second")
    assert not torch.equal(logits(model, batch), first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    model.delete_adapter("default")
    assert "default" not in model.peft_config


def test_autocast_adapter_dtype(llama):
    model = get_peft_model(llama[0].bfloat16(), HyperAdaptConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_bias_is_trained_on_request():
    model, *_ = build("opt")
    model = get_peft_model(model, HyperAdaptConfig(target_modules=["q_proj"], bias="hyperadapt_only"))
    biases = [n for n, p in model.named_parameters() if p.requires_grad and "bias" in n]
    assert biases and all("q_proj" in name for name in biases)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("sides", "rows", "`sides` must be one of ('both', 'row', 'column'), not 'rows'"),
        ("bias", "lora_only", "`bias` must be one of ('none', 'all', 'hyperadapt_only'), not 'lora_only'"),
        ("init_weights", "gaussian", "`init_weights` must be bool, not 'gaussian'"),
        ("init_weights", 1, "`init_weights` must be bool, not 1"),
        (
            "target_modules",
            3,
            "`target_modules` must be list[str] or tuple[str, ...] or set[str] or str or None, not 3",
        ),
        (
            "target_modules",
            [3],
            "`target_modules` must be list[str] or tuple[str, ...] or set[str] or str or None, not [3]",
        ),
        (
            "exclude_modules",
            {"a": 1},
            "`exclude_modules` must be list[str] or tuple[str, ...] or set[str] or str or None, not {'a': 1}",
        ),
        (
            "modules_to_save",
            "score",
            "`modules_to_save` must be list[str] or tuple[str, ...] or set[str] or None, not 'score'",
        ),
        (
            "layers_to_transform",
            "1",
            "`layers_to_transform` must be list[int] or tuple[int, ...] or set[int] or int or None, not '1'",
        ),
        (
            "layers_to_transform",
            [True],
            "`layers_to_transform` must be list[int] or tuple[int, ...] or set[int] or int or None, not [True]",
        ),
        ("layers_pattern", "h", "`layers_to_transform` must also be specified"),
        (
            "trainable_token_indices",
            {"embed": ["a"]},
            "`trainable_token_indices` must be list[int] or tuple[int, ...] or set[int] or dict[str, ",
        ),
    ],
)
def test_config_fields_are_checked(field, value, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        HyperAdaptConfig(**{field: value})


def test_mamba_kernels_read_out_proj_uncalled():
    from transformers import MambaConfig, MambaForCausalLM

    def mamba():
        config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
        return MambaForCausalLM(config)

    with pytest.raises(ValueError, match="out_proj is not supported"):
        get_peft_model(mamba(), HyperAdaptConfig(target_modules=["in_proj", "out_proj"]))
    with pytest.warns(UserWarning, match="out_proj"):
        model = get_peft_model(mamba(), HyperAdaptConfig())
    assert {name.split(".")[-1] for name in model.targeted_module_names} == {"in_proj"}


def test_inject_from_state_dict_and_disable_input_dtype_casting(llama):
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from peft.helpers import disable_input_dtype_casting

    model, batch, _ = llama
    adapted = random_adapter(model)
    expected = logits(adapted, batch)
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(adapted).items()}
    fresh = inject_adapter_in_model(HyperAdaptConfig(), build("llama")[0], state_dict=state)
    set_peft_model_state_dict(fresh, state)
    with disable_input_dtype_casting(fresh):
        assert torch.equal(logits(fresh, batch), expected)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_layers_with_a_bias(offload, tmp_path):
    """An offloaded bias is only there while its layer runs; reading it beside the layer finds the meta device."""
    from accelerate import cpu_offload, disk_offload

    model, batch, _ = build("opt")
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    model = random_adapter(model)
    expected = logits(model, batch)
    model = cpu_offload(model) if offload == "cpu" else disk_offload(model, str(tmp_path))
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
