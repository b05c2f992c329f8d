"""What only a GPU shows; `python -m pytest tests/test_cuda.py` where there is one."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from . import tiny


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")
CONFIGS = {
    "hyperadapt": lambda: HyperAdaptConfig(task_type="CAUSAL_LM", init_weights=False),
    "save-memory": lambda: HyperAdaptConfig(task_type="CAUSAL_LM", init_weights=False, save_memory=True),
} | {
    f"surm-{structure}": lambda structure=structure: SurmConfig(
        task_type="CAUSAL_LM", init_weights=False, structure=structure
    )
    for structure in STRUCTURES
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


@pytest.fixture
def batch():
    return {key: value.cuda() for key, value in tiny.build("llama")[1].items()}


def adapted(config, dtype=torch.float32):
    torch.manual_seed(0)
    return get_peft_model(tiny.build("llama")[0].to("cuda", dtype), config)


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())
    return found


@pytest.fixture
def never_waits():
    """Inside its context, what waits for the GPU raises."""

    class NeverWaits:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    return NeverWaits()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_never_waits(config, dtype, batch, never_waits):
    model = adapted(config, dtype).train()
    model(**batch).loss.backward()  # plans of FFTs, handles
    with never_waits:
        model(**batch).loss.backward()
    gradients(model)


def test_a_step_under_autocast_never_waits(config, batch, never_waits):
    model = adapted(config).train()
    for context in (torch.autocast("cuda", torch.bfloat16), never_waits):
        with context, torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        with context:
            loss.backward()
    gradients(model)


def test_a_mixed_batch_never_waits_and_is_each_sample_alone(config, batch, never_waits):
    model = adapted(config).eval()
    for name in ("a", "b"):
        model.add_adapter(name, config)
    names = ["default", "a", "b", "__base__"] * 2
    with torch.no_grad():
        model(**batch, adapter_names=names)
        with never_waits:
            mixed = model(**batch, adapter_names=names).logits
        for i, name in enumerate(names):
            model.set_adapter("default" if name == "__base__" else name)
            row = {key: value[i : i + 1] for key, value in batch.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**row).logits
            else:
                alone = model(**row).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_training_step_as_a_cuda_graph(config, batch):
    """Forward, backward and AdamW, captured once and replayed, train as they do eagerly."""
    eager = adapted(config).train()
    captured = copy.deepcopy(eager)

    def step(model, optimizer):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, capturable=True)
        for model in (eager, captured)
    ]
    losses = [step(eager, optimizers[0]) for _ in range(6)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, optimizers[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizers[1])
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(loss.clone())
    torch.testing.assert_close(torch.stack(replayed), torch.stack(losses[3:]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_cpu_s(config, dtype, batch):
    model = adapted(config, dtype).train()
    model(**batch).loss.backward()
    reference = copy.deepcopy(model).cpu().float()
    reference.zero_grad()
    reference(**{key: value.cpu() for key, value in batch.items()}).loss.backward()
    expected = gradients(reference)
    for name, grad in gradients(model).items():
        error = (grad.cpu().float() - expected[name]).norm() / expected[name].norm()
        limit = 0.15 if dtype != torch.float32 or getattr(config, "save_memory", False) else 1e-3
        assert error < limit, (name, error)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_every_bit(config, dtype, batch):
    model = adapted(config, dtype).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(**batch).logits
    model.merge_adapter(safe_merge=True)
    merged = model(**batch).logits
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(merged, logits, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_saved_on_a_gpu_and_loaded_there_and_on_a_cpu(config, batch, tmp_path):
    model = adapted(config).eval()
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build("llama")[0].cuda(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)
    again = PeftModel.from_pretrained(tiny.build("llama")[0], tmp_path, torch_device="cpu").eval()
    on_cpu = again(**{key: value.cpu() for key, value in batch.items()}).logits
    torch.testing.assert_close(on_cpu, logits.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(config, mode, batch):
    model = adapted(config).train()
    model(**batch).loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):  # of which the last is a graph's replay
        model.zero_grad()
        compiled(**batch).loss.backward()
    for name, grad in gradients(model).items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < (0.15 if getattr(config, "save_memory", False) else 1e-3), (name, error)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_trainer(config, precision, gradient_checkpointing, tmp_path):
    model = adapted(config)
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.build("llama")[1]["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, max_steps=20, save_strategy="no", report_to=[], logging_steps=1,
        gradient_checkpointing=gradient_checkpointing, disable_tqdm=True, **{precision: True},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


@torch.no_grad()
def test_some_layers_offloaded_to_the_cpu(config, batch, tmp_path):
    base = tiny.build("llama")[0]
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = model.cuda()(**batch).logits
    places = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    places |= {"model.layers.0": 0, "model.layers.1": "cpu"}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places)
    again = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map={f"base_model.model.{key}": place for key, place in places.items()}
    ).eval()
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    again.merge_adapter()
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-3, atol=1e-4)


QUANTIZATIONS = {
    "8bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16},
}  # fmt: skip


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantized_base(config, quantization, batch, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny.build("llama")[0].save_pretrained(tmp_path / "base")

    def load():
        options = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=options, dtype=torch.bfloat16, device_map={"": 0}
        ).eval()

    @torch.no_grad()
    def logits(model):
        return model(input_ids=batch["input_ids"]).logits

    base = load()
    before = logits(base)
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter(safe_merge=True)
    # quantized again, which a random update survives badly
    assert (logits(model) - trained).norm() < 0.8 * trained.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()), trained)
