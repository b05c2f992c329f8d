"""PEFT's conversion to LoRA of both tuners, and the energy it keeps."""

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.conversion import lora_energy

from ..tiny import build


CONFIGS = {
    "hyperadapt": HyperAdaptConfig,
    "surm": lambda **kw: SurmConfig(structure="ldr", **kw),
}
_, BATCH, _ = build("llama")


@torch.no_grad()
def logits(model):
    return model.eval()(**BATCH).logits


@pytest.fixture(params=[(c, a) for c in CONFIGS for a in ("llama", "gpt2")], ids="-".join)
def adapted(request):
    config, architecture = request.param
    torch.manual_seed(0)
    model = get_peft_model(build(architecture)[0], CONFIGS[config](task_type="CAUSAL_LM"))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model, lambda: build(architecture)[0]


@pytest.mark.parametrize("rank", [1, 4])
def test_the_energy_is_what_the_converted_update_holds(adapted, rank):
    model, base = adapted
    energy = lora_energy(model, rank)
    config, state = convert_to_lora(model, rank=rank)
    lora = get_peft_model(base(), config)
    set_peft_model_state_dict(lora, state)
    assert energy.keys() == {name for name, m in lora.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    for name, kept in energy.items():
        update = model.get_base_model().get_submodule(name).get_delta_weight("default")
        approximation = lora.get_base_model().get_submodule(name).get_delta_weight("default")
        lost = (update - approximation).square().sum() / update.square().sum()
        assert 1 - lost.item() == pytest.approx(kept, abs=1e-4)
        assert 0 < kept < 1


@pytest.mark.parametrize("config", CONFIGS)
def test_full_rank_keeps_all(config, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(build("llama")[0], CONFIGS[config](target_modules=["q_proj", "o_proj"], init_weights=False))
    assert min(lora_energy(model, 32).values()) == pytest.approx(1.0)
    expected = logits(model)
    save_as_lora(tmp_path, model, rank=32)
    loaded = PeftModel.from_pretrained(build("llama")[0], tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


def test_a_rank_by_energy_keeps_at_least_as_much(adapted):
    model, _ = adapted
    config, _ = convert_to_lora(model, rank=0.9)
    for name in lora_energy(model, 1):
        rank = config.rank_pattern.get(name, config.r)
        assert lora_energy(model, rank)[name] >= 0.9 - 1e-5
        assert rank == 1 or lora_energy(model, rank - 1)[name] < 0.9


def test_the_identity_loses_nothing():
    model = get_peft_model(build("llama")[0], HyperAdaptConfig())
    assert set(lora_energy(model, 1).values()) == {1.0}


@pytest.mark.parametrize(
    "config, options, message",
    [
        (HyperAdaptConfig(), {"rank": 0}, "at least 1"),
        (HyperAdaptConfig(), {"rank": 1, "adapter_name": "other"}, "other not found"),
        (HyperAdaptConfig(target_modules=["embed_tokens"]), {"rank": 1}, "model.embed_tokens cannot be converted"),
        (SurmConfig(placement="sequential"), {"rank": 1}, "cannot be converted"),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message):
        lora_energy(get_peft_model(build("llama")[0], config), **options)
