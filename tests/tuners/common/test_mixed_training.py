"""Many adapters trained by one run: every sample names its own, and its gradient goes there."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.bert.modeling_bert import BertLayer

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ...tiny import SIZES, build


CONFIGS = {
    "hyperadapt": HyperAdaptConfig,
    "surm": SurmConfig,
    "surm-sequential": lambda **kwargs: SurmConfig(placement="sequential", **kwargs),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def adapted(architecture, config, names, **options):
    """A model with these adapters, each with random values and a head of its own, all of them to be trained."""
    base, batch, task_type = build(architecture)
    options = {"task_type": task_type, "init_weights": False, **options}
    model = get_peft_model(base, config(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**options))
    torch.manual_seed(1)
    for key, p in model.named_parameters():
        if "modules_to_save" in key:
            p.data = torch.randn_like(p)
    model.set_requires_grad(names)
    return model.train(), batch


def of(model, name):
    """An adapter's parameters, its head included."""
    return {key: p for key, p in model.named_parameters() if f".{name}." in key}


def row_losses(model, batch, **kwargs):
    """Each sample's own loss."""
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, **kwargs).logits
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.reshape(len(labels), -1).mean(1)


@pytest.mark.parametrize("architecture", ["bert", "llama", "opt"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_gradients_are_those_of_each_adapter_alone(architecture, config, checkpointing):
    model, batch = adapted(architecture, config, ["a", "b", "c"])
    rows = {"a": [0, 3], "b": [1], "c": [], "__base__": [2]}
    names = ["a", "b", "__base__", "a"]
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    batch = {key: value[:4] for key, value in batch.items()}
    row_losses(model, batch, adapter_names=names).sum().backward()
    grads = {name: {key: p.grad for key, p in of(model, name).items()} for name in "abc"}
    assert all(grad is None or not grad.any() for grad in grads["c"].values())
    for name in "ab":
        model.zero_grad()
        model.set_adapter(name)
        row_losses(model, {key: value[rows[name]] for key, value in batch.items()}).sum().backward()
        for key, p in of(model, name).items():
            assert p.grad.any(), key
            torch.testing.assert_close(grads[name][key], p.grad, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl:FutureWarning")  # of torch 2.6
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_does_not_know_the_names_is_refused(config, reentrant):
    """It runs layers again after the call, when the active adapter would get the gradient."""
    model, batch = adapted("bert", config, ["a", "b"])
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, kind),
        check_fn=lambda module: isinstance(module, BertLayer),
    )
    model.enable_input_require_grads()
    loss = model(**batch, adapter_names=["b"] * len(batch["labels"])).loss
    with pytest.raises(RuntimeError, match="use that of transformers"):
        loss.backward()
    assert all(p.grad is None for p in of(model, "a").values())
    model.zero_grad()
    model(**batch).loss.backward()
    assert any(p.grad is not None for p in of(model, "a").values())


def test_threads_train_with_names_and_checkpointing(config):
    """One call begins while another runs, and ends after it."""
    model, batch = adapted("llama", config, ["a", "b"])
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()

    def gradients(name):
        losses = row_losses(model, batch, adapter_names=[name] * len(batch["labels"]))
        return torch.autograd.grad(losses.sum(), list(of(model, name).values()))

    expected = {name: gradients(name) for name in "ab"}
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    running, begun, ended = threading.local(), threading.Event(), threading.Event()

    def wait(*args):
        if running.name == "a" and not begun.is_set():
            b = threads.submit(run, "b")
            assert begun.wait(60)
            results.append(b)
        elif running.name == "b" and not begun.is_set():
            begun.set()
            assert ended.wait(60)

    def run(name):
        running.name = name
        return gradients(name)

    results = []
    hook = model.get_input_embeddings().register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        a = threads.submit(run, "a").result()
        ended.set()
        b = results[0].result()
    hook.remove()
    torch.testing.assert_close({"a": a, "b": b}, expected)
    assert functions == [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]


RATES, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2, 3)
RUNS = {f"rate{rate:g}_seed{seed}".replace(".", "_"): (rate, seed) for rate, seed in itertools.product(RATES, SEEDS)}
STEPS, ROWS = 4, 2  # rows of one adapter in a batch


class Rows(Dataset):
    """Step by step, the rows of one adapter after those of another; a seed has an order of its own."""

    def __init__(self, batch, names):
        orders = {seed: torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist() for seed in SEEDS}
        self.items = [
            {**{key: value[orders[RUNS[name][1]][ROWS * step + row]] for key, value in batch.items()}, "adapter": name}
            for step in range(STEPS)
            for name in names
            for row in range(ROWS)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def collate(items):
    batch = default_collate(items)
    batch["adapter_names"] = batch.pop("adapter")
    return batch


class TrainAll(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.set_requires_grad(list(model.peft_config))


def train(model, batch, names, output_dir, resume=None, **options):
    """The documented way: names from the collator, the sum of the adapters' means, a parameter group for each."""
    groups = [{"params": list(of(model, name).values()), "lr": RUNS[name][0]} for name in names]
    Trainer(
        model,
        TrainingArguments(
            output_dir=output_dir, per_device_train_batch_size=ROWS * len(names), num_train_epochs=1, report_to=[],
            remove_unused_columns=False, max_grad_norm=0, lr_scheduler_type="linear", disable_tqdm=True,
            train_sampling_strategy="sequential", use_cpu=True, **{"save_strategy": "no"} | options,
        ),
        train_dataset=Rows(batch, names),
        data_collator=collate,
        callbacks=[TrainAll()],
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.01), None),
        compute_loss_func=lambda outputs, labels, **kwargs: F.cross_entropy(outputs.logits, labels, reduction="sum") / ROWS,
    ).train(resume_from_checkpoint=resume)  # fmt: skip


def test_sixteen_adapters_from_one_run_are_those_of_sixteen_runs(tmp_path):
    model, batch = adapted("bert", HyperAdaptConfig, list(RUNS), init_weights=True)
    start = {name: {key: p.detach().clone() for key, p in of(model, name).items()} for name in RUNS}
    train(model, batch, list(RUNS), tmp_path)
    model.save_pretrained(tmp_path)
    for name in RUNS:
        alone, batch = adapted("bert", HyperAdaptConfig, [name], init_weights=True)
        with torch.no_grad():
            for key, p in of(alone, name).items():
                p.copy_(start[name][key])
        train(alone, batch, [name], tmp_path)
        assert of(alone, name).keys() == of(model, name).keys()
        for key, p in of(alone, name).items():
            assert not torch.allclose(p, start[name][key], atol=1e-4), key
            torch.testing.assert_close(of(model, name)[key], p, rtol=1e-3, atol=1e-5)
    loaded = PeftModel.from_pretrained(build("bert")[0], tmp_path / name, adapter_name=name)  # as any adapter
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, alone.eval()(**batch).logits, rtol=1e-3, atol=1e-5)


def test_a_run_of_many_adapters_is_resumed(tmp_path):
    names = list(RUNS)[:3]
    model, batch = adapted("bert", HyperAdaptConfig, names, init_weights=True)
    train(model, batch, names, tmp_path, save_strategy="steps", save_steps=2)
    again, batch = adapted("bert", HyperAdaptConfig, names, init_weights=True)
    train(again, batch, names, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    for name in names:
        torch.testing.assert_close(of(again, name), of(model, name))


def test_frozen_adapters_are_refused():
    model, batch = adapted("bert", HyperAdaptConfig, ["a", "b"])
    model.set_adapter("a")  # PEFT freezes the others
    names = ["a", "b", "__base__", "a"]
    inputs = {"input_ids": batch["input_ids"][:4]}
    with pytest.raises(ValueError, match=r"Frozen adapters cannot be trained: b\. Call `model.set_requires_grad"):
        model(**inputs, adapter_names=names)
    with torch.no_grad():
        model(**inputs, adapter_names=names)
    model.eval()(**inputs, adapter_names=names)


def test_memory_is_saved_where_all_that_are_named_want_it():
    """Whatever is active."""
    model, batch = adapted("llama", HyperAdaptConfig, ["small"], save_memory=True)
    model.add_adapter("exact", HyperAdaptConfig(task_type="CAUSAL_LM", init_weights=False))
    names = ["small", "exact"]

    def gradients(adapter_names):
        model.set_requires_grad(names)
        losses = row_losses(model, batch, adapter_names=adapter_names)
        return {
            name: torch.autograd.grad(losses.sum(), list(of(model, name).values()), retain_graph=True)
            for name in dict.fromkeys(adapter_names)
        }

    rows = len(batch["labels"])
    found = []
    for active in names:
        model.set_adapter(active)
        alone = {name: gradients([name] * rows)[name] for name in names}
        found.append((alone, gradients(names * (rows // 2))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    model.set_adapter("exact")
    exact = torch.autograd.grad(row_losses(model, batch).sum(), list(of(model, "exact").values()))
    torch.testing.assert_close(found[0][0]["exact"], exact)
    assert not torch.allclose(torch.cat(found[0][0]["small"]), torch.cat(exact), rtol=1e-2)


def test_heads_that_are_no_single_layers_are_refused():
    base = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, num_labels=2))
    model = get_peft_model(base, HyperAdaptConfig(task_type="SEQ_CLS"))
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules: Linear"):
        model.train()(input_ids=torch.randint(3, 64, (2, 4)), adapter_names=["default", "default"])


@pytest.mark.parametrize("first_has_a_head", [True, False])
def test_heads_of_some_adapters_only(first_has_a_head):
    base, batch, _ = build("bert")
    heads = [["classifier"], None] if first_has_a_head else [None, ["classifier"]]
    model = get_peft_model(base, HyperAdaptConfig(init_weights=False, modules_to_save=heads[0]), adapter_name="a")
    model.add_adapter("b", HyperAdaptConfig(init_weights=False, modules_to_save=heads[1]))
    for key, p in model.named_parameters():
        if "modules_to_save" in key:
            p.data = torch.randn_like(p)
    inputs, names = batch["input_ids"][:3], ["a", "b", "__base__"]
    with torch.no_grad():
        model.eval()
        for i, name in enumerate("ab"):
            model.set_adapter(name)  # what is active must not matter
            mixed = model(input_ids=inputs, adapter_names=names).logits
            torch.testing.assert_close(mixed[i : i + 1], model(input_ids=inputs[i : i + 1]).logits)
