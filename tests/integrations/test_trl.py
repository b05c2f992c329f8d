"""TRL's trainers on both tuners: SFT, DPO with its reference adapter, and GRPO's merges for generation."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

from ..tiny import build
from .conftest import sentence, tiny_tokenizer


trl = pytest.importorskip("trl", reason="needs the extra `test`")

ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


@pytest.fixture
def base(tmp_path):
    """The directory of a saved tiny Llama."""
    path = tmp_path / "base"
    build("llama")[0].save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=build("llama")[1]["input_ids"]).logits


def trained_adapter(model, config):
    """`model` with an adapter as training would leave it: far from the identity."""
    model = get_peft_model(model, config(task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model


def parameters(model, *parts):
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(part in n for part in parts)}


def trainer(cls, args_cls, model, tmp_path, rows, **kwargs):
    args = args_cls(output_dir=str(tmp_path / "run"), **ARGUMENTS)
    return cls(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), **kwargs)


def test_sft_trains_saves_and_loads(config, base, tmp_path):
    rows = [{"prompt": sentence(i), "completion": " " + sentence(i + 6)} for i in range(12)]
    sft = trainer(trl.SFTTrainer, trl.SFTConfig, str(base), tmp_path, rows, peft_config=config(task_type="CAUSAL_LM"))
    assert isinstance(sft.model, PeftModel)
    before = {n: p.detach().clone() for n, p in sft.model.named_parameters()}
    sft.train()
    changed = {n for n, p in sft.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(f".{config().peft_type.value.lower()}_" in n for n in changed)
    sft.save_model(str(tmp_path / "saved"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(sft.model))


def preferences():
    return [
        {"prompt": sentence(i), "chosen": " " + sentence(i + 6), "rejected": " " + sentence(i + 30)} for i in range(12)
    ]


def test_dpo_s_reference_adapter_is_the_adapter_bit_by_bit_and_stays(config, base, tmp_path):
    model = trained_adapter(build("llama")[0], config)
    before, start = parameters(model, ".default."), logits(model)
    assert before
    dpo = trainer(trl.DPOTrainer, trl.DPOConfig, model, tmp_path, preferences())
    assert set(model.peft_config) == {"default", "ref"}

    def references():
        return {n.replace(".ref.", ".default."): p for n, p in parameters(model, ".ref.").items()}

    assert references().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in references().items())
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    model.set_adapter("default")

    dpo.train()
    assert all(torch.equal(p, before[n]) for n, p in references().items())
    assert any(not torch.equal(p, before[n]) for n, p in parameters(model, ".default.").items())
    assert model.active_adapter == "default"
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    # before the first step both have the same log-probabilities, so the first loss is ln 2
    first = next(entry["loss"] for entry in dpo.state.log_history if "loss" in entry)
    assert first == pytest.approx(0.6931, abs=1e-3)


def test_dpo_of_a_new_adapter_takes_the_base_model_as_reference(config, base, tmp_path):
    plain = logits(build("llama")[0])
    dpo = trainer(
        trl.DPOTrainer, trl.DPOConfig, str(base), tmp_path, preferences(), peft_config=config(task_type="CAUSAL_LM")
    )
    dpo.train()
    assert set(dpo.model.peft_config) == {"default"}
    assert not torch.equal(logits(dpo.model), plain)
    with dpo.model.disable_adapter():
        assert torch.equal(logits(dpo.model), plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_merges_for_generation_drift_by_nothing(config, dtype):
    model = trained_adapter(build("llama")[0].to(dtype), config)
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    ids = build("llama")[1]["input_ids"][:1]
    tokens = set()
    for _ in range(100):  # as GRPO does before each round of generation
        model.merge_adapter()
        assert not torch.equal(model.get_parameter(BASE_WEIGHT), before[BASE_WEIGHT])
        tokens.add(tuple(model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0].tolist()))
        model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), expected) and len(tokens) == 1


BASE_WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def test_grpo_trains_and_leaves_the_base_as_it_was(config, tmp_path):
    model = trained_adapter(build("llama")[0], config)
    before = parameters(model, ".default.", BASE_WEIGHT)
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"),
        num_generations=4,
        max_completion_length=4,
        beta=0.1,
        **{**ARGUMENTS, "max_steps": 2},
    )

    def reward(completions, **kwargs):
        return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]

    rows = Dataset.from_list([{"prompt": sentence(i)} for i in range(8)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grpo = trl.GRPOTrainer(model, reward, args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    grpo.train()
    after = parameters(model, ".default.", BASE_WEIGHT)
    assert torch.equal(after[BASE_WEIGHT], before[BASE_WEIGHT])
    assert any(not torch.equal(p, before[n]) for n, p in after.items())
    assert all(torch.equal(p, before[n.replace(".ref.", ".default.")]) for n, p in parameters(model, ".ref.").items())
