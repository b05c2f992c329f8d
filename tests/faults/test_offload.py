"""Adapters on a base model whose weights are offloaded to the CPU's or the disk's side of accelerate's hooks."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ..tiny import build


def offloaded(how, path):
    """The base model of `path`, with the adapter of `path`, in part or whole offloaded."""
    options = {}
    if how == "device_map":
        places = {"model.layers.1": "disk", "model.layers.0": "cpu"}
        rest = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        options = {"device_map": {**places, **rest}, "offload_folder": str(path / "offload")}
    model = LlamaForCausalLM.from_pretrained(path / "base", **options)
    if how == "device_map":  # PEFT dispatches again, by the names in the adapted model
        options["device_map"] = {f"base_model.model.{key}": place for key, place in options["device_map"].items()}
        return PeftModel.from_pretrained(model, path / "adapter", **options)
    model = PeftModel.from_pretrained(model, path / "adapter")
    return cpu_offload(model) if how == "cpu" else disk_offload(model, str(path / "offload"))


@torch.no_grad()
@pytest.mark.parametrize("config", [HyperAdaptConfig, SurmConfig])
@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
def test_forward_save_merge_and_unmerge(config, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT keeps what it merged on the disk beneath the working directory
    base, batch, task_type = build("llama")
    base.save_pretrained(tmp_path / "base")
    plain = get_peft_model(base, config(task_type=task_type, init_weights=False)).eval()
    plain.save_pretrained(tmp_path / "adapter")
    expected = plain(**batch).logits
    model = offloaded(how, tmp_path).eval()
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    assert any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks)

    def check(logits):
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)

    check(expected)
    # what is offloaded itself has no data between its forwards, here as in PEFT's own methods
    model.save_pretrained(tmp_path / "again", state_dict=get_state_dict_offloaded_model(model))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "again")
    assert torch.equal(again.eval()(**batch).logits, expected)
    plain.merge_adapter()
    merged = plain(**batch).logits
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        check(merged)
        model.unmerge_adapter()
        check(expected)
    model.add_adapter("second", config(task_type=task_type, init_weights=False))
    check(expected)
    model.delete_adapter("second")
    model = model.merge_and_unload()
    check(merged)
