"""Measure what training with each method costs, side by side in one process on one device."""

import copy
import gc
import json
import math
import platform
import random
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..tuners.hyperadapt import HyperAdaptConfig, HyperAdaptLayer
from .errors import RecipeError, errors_about, suggestion
from .memory import KernelCounter, SavedTensors, peak_bytes, storages, stored_bytes, tensors
from .models import build, load_config, make_batch
from .recipe import read_tuner
from .tasks import Task, find_task


FROZEN = "frozen"
# Name -> its `tuner` section; all adapt the same linear layers, every one but the output head.
METHODS: dict[str, dict[str, Any]] = {
    FROZEN: {},
    "hyperadapt": {"peft_type": "HYPERADAPT"},
    "hyperadapt-save-memory": {"peft_type": "HYPERADAPT", "save_memory": True},
    "surm-circulant": {"peft_type": "SURM", "structure": "circulant"},
    "surm-toeplitz": {"peft_type": "SURM", "structure": "toeplitz"},
    "surm-kronecker": {"peft_type": "SURM", "structure": "kronecker"},
    "surm-ldr": {"peft_type": "SURM", "structure": "ldr"},
    "lora-r1": {"peft_type": "LORA", "r": 1},
    "lora-r8": {"peft_type": "LORA", "r": 8},
    "dora-r8": {"peft_type": "LORA", "r": 8, "use_dora": True},
    "ia3": {"peft_type": "IA3", "feedforward_modules": []},  # scales every output
    "road": {"peft_type": "ROAD"},
    "vera-r256": {"peft_type": "VERA", "r": 256},
    "miss-r8": {"peft_type": "MISS", "r": 8},
    "c3a": {"peft_type": "C3A"},
    "full": {"peft_type": "FULL"},
}
BLOCKS = {"ROAD": ("group_size", 64), "C3A": ("block_size", 256)}  # the default, or what divides it and every width
REPEATS = 3  # of loading and merging

Setup = tuple[Any, torch.optim.Optimizer | None]  # a model in training, and its optimizer; a frozen one has none


def bench(
    model: str = "llama",
    task: str = "causal-lm",
    batch_size: int = 4,
    sequence_length: int = 256,
    dtype: str = "float32",
    rounds: int = 7,
    methods: Sequence[str] | None = None,
    output_dir: str | Path = "runs/bench",
    device: str = "cpu",
    autocast: bool = False,
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """Measure, and write `bench.json`, `bench.md` and `bench.png` into the output directory.

    The model has random weights, for none of this depends on their values, and all methods but `full` share them. A
    step is a forward pass, a backward pass and AdamW. `frozen` trains nothing, and its backward pass goes through all
    layers to the embeddings' output; the other methods' goes as far as they need. Each round times one step of every
    method, in random order; `step_ratio` is the median over the rounds of the ratio to the frozen step of the same
    round.

    A method for which the device's memory is too small has a row that says so and nothing else. Other rows also have:
        kernels, training_kernels: the kernels of a call in inference, and of a training step, of one linear layer
            without bias of width 256 in `dtype`; `KernelCounter` says what counts.
        syncs: the operations among those that wait for the device.
        trainable: the trained parameters.
        saved_bytes: what autograd keeps for the backward pass; `SavedTensors` says what counts.
        peak_bytes: the most memory of a step beside the base model's weights: the method's own parameters and
            optimizer states, and what torch allocates during the step.
        adapter_bytes: the weights that `save_pretrained` writes; the whole model for `full`.
        load_seconds, merge_seconds: `PeftModel.from_pretrained` onto a model in memory, and `merge_adapter`, the
            medians of three. These and `adapter_bytes` are measured on the CPU only.

    The arguments are the command's: `hyperadapt bench --help`. The frozen model is always measured.

    Raises:
        RecipeError: a method or the model does not exist, or they do not fit each other.
    """
    names = dict.fromkeys([FROZEN, *(METHODS if methods is None else methods)])
    for name in names:
        if name not in METHODS:
            expected = f"expected some of {', '.join(METHODS)}"
            raise RecipeError(f"methods: {expected}, got {name!r}{suggestion(name, METHODS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device: torch sees no GPU here")
    if rounds < 1:
        raise RecipeError(f"rounds: expected at least 1, got {rounds}")
    kind, config = find_task(task), load_config(model)
    with errors_about("output_dir"):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(device):
        base = build(config, kind, dtype)
        batch = make_batch(base, batch_size, sequence_length)
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    linears = _linears(base, kind)
    setups = {name: _set_up(name, base, kind, linears) for name in tqdm(names, desc="models", unit="model")}
    if compile:  # torch counts all models' forwards as one function, and gives up at 8
        torch._dynamo.config.recompile_limit = 8 * len(setups)
    for name in setups:
        _wrap(setups[name][0], device, autocast, compile)
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in names}
    for name, row in (bar := tqdm(rows.items(), desc="memory", unit="method")):
        bar.set_postfix_str(name)
        try:
            row |= _measure(setups[name], base, batch) | _kernels(name, base.dtype)
        except torch.OutOfMemoryError:
            if name == FROZEN:
                raise
            row["out_of_memory"] = True
        if "out_of_memory" in row:  # not before the error is gone, which holds what the step had computed
            del setups[name]
            gc.collect()
            torch.cuda.empty_cache()
    seconds = _time(setups, batch, rounds)
    for name in setups.keys() - seconds.keys():
        rows[name] = {"method": name, "out_of_memory": True}
    for name, own in seconds.items():
        ratios = [step / frozen for step, frozen in zip(own, seconds[FROZEN], strict=True)]
        rows[name] |= {
            "step_seconds": statistics.median(own),
            "step_ratio": statistics.median(ratios),
            "step_ratios": ratios,
        }
    results = {
        "model": {"name": model, "class": type(base).__name__, "parameters": base.num_parameters()},
        "settings": {
            "task": task,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "dtype": dtype,
            "rounds": rounds,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "autocast": autocast,
            "gradient_checkpointing": gradient_checkpointing,
            "compile": compile,
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("hyperadapt_peft", "peft", "transformers", "torch")},
        "rows": [*rows.values()],
    }
    _write(Path(output_dir), results)
    return results


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| method | step, x frozen | kept, MiB | peak, MiB | kernels: a call | a step | syncs | trained | saved, bytes "
        "| merge, ms | load, ms |\n| --- |" + " ---: |" * 10
    ]
    for row in rows:
        if "out_of_memory" in row:
            lines.append(f"| {row['method']} | out of memory |" + " |" * 9)
            continue
        saved = "" if row["adapter_bytes"] is None else f"{row['adapter_bytes']:,}"
        merge, load = (
            "" if row[key] is None else f"{1000 * row[key]:.0f}" for key in ("merge_seconds", "load_seconds")
        )
        lines.append(
            f"| {row['method']} | {row['step_ratio']:.2f} | {row['saved_bytes'] / 2**20:.0f} | "
            f"{row['peak_bytes'] / 2**20:.0f} | {row['kernels']} | {row['training_kernels']} | {row['syncs']} | "
            f"{row['trainable']:,} | {saved} | {merge} | {load} |"
        )
    return "\n".join(lines) + "\n"


def _set_up(name: str, base: PreTrainedModel, task: Task, linears: dict[str, tuple[int, int]]) -> Setup:
    section = METHODS[name]
    changes: dict[str, Any] = {"target_modules": [*linears], "task_type": task.task_type}
    if section.get("peft_type") in BLOCKS:
        key, size = BLOCKS[section["peft_type"]]
        changes[key] = math.gcd(size, *(width for widths in linears.values() for width in widths))
    with errors_about(name):  # the steps of `full` change the weights
        model = _adapted(name, copy.deepcopy(base) if name == "full" else _share(base), changes)
    if name == FROZEN:
        model.enable_input_require_grads()
        return model, None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-3)


def _wrap(model: Any, device: str, autocast: bool, compile: bool) -> None:
    if autocast:
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    if compile:
        model.forward = torch.compile(model.forward)


def _adapted(name: str, model: Any, changes: dict[str, Any]) -> Any:
    """The model with a method, whose section is changed where it must fit the model."""
    if name in (FROZEN, "full"):
        return model.requires_grad_(name == "full")
    peft_config: Any = read_tuner({**METHODS[name], **changes}, find_task("causal-lm"))[1]
    return get_peft_model(model, peft_config)


def _share(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules, but with the tensors of `model`."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors(model)})


def _linears(base: PreTrainedModel, task: Task) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of the layers that HyperAdapt adapts by default."""
    model: Any = get_peft_model(_share(base), HyperAdaptConfig(task_type=task.task_type))
    modules = model.get_base_model().named_modules()
    layers = {name: layer for name, layer in modules if isinstance(layer, HyperAdaptLayer)}
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """What follows the forward pass of a training step."""
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def _measure(setup: Setup, base: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A row of the table but for the step's time; two steps are made, which warm up."""
    model, optimizer = setup
    saved = SavedTensors(tensors(model))
    with saved:
        loss = model(**batch).loss
    row: dict[str, Any] = {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "saved_bytes": saved.nbytes(),
    }
    _update(loss, optimizer)
    del loss
    states = [value for state in optimizer.state.values() for value in state.values()] if optimizer else []
    own = stored_bytes(model) - stored_bytes(base) + sum(storages(states).values())
    row["peak_bytes"] = own + peak_bytes(lambda: _update(model(**batch).loss, optimizer), base.device.type)
    return row | _files(model, base, trained=optimizer is not None)


def _kernels(name: str, dtype: torch.dtype) -> dict[str, int]:
    """The kernels of one adapted linear layer without bias, on the CPU; those of a training step with its loss, a sum."""
    width = 256
    layer = nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype))
    model = _adapted(name, layer, {"target_modules": ["0"], "task_type": None})
    x = torch.randn(4, width, dtype=dtype, requires_grad=True)
    with torch.no_grad(), KernelCounter() as inference:
        model.eval()(x)
    with KernelCounter() as training:
        model.train()(x).sum().backward()
    syncs = inference.syncs + training.syncs
    return {"kernels": inference.kernels, "training_kernels": training.kernels, "syncs": syncs}


def _files(model: Any, base: PreTrainedModel, trained: bool) -> dict[str, Any]:
    """What saving, loading and merging take; None where there is nothing to save, load or merge."""
    row: dict[str, Any] = dict.fromkeys(("adapter_bytes", "load_seconds", "merge_seconds"))
    if not trained or base.device.type != "cpu":
        return row
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        row["adapter_bytes"] = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        if not isinstance(model, PeftModel):
            return row
        bases = [_share(base) for _ in range(REPEATS)]
        row["load_seconds"] = _median(lambda: PeftModel.from_pretrained(bases.pop(), directory))
    apart: Any = copy.deepcopy(model)  # with weights of its own
    apart.merge_adapter()
    row["merge_seconds"] = _median(apart.merge_adapter, setup=apart.unmerge_adapter)
    return row


def _median(run: Callable[[], Any], setup: Callable[[], Any] | str = "pass") -> float:
    return statistics.median(timeit.repeat(run, setup, number=1, repeat=REPEATS))


def _time(setups: dict[str, Setup], batch: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Method -> the seconds of its step in each round; without those for which the memory was too small in the end."""
    seconds: dict[str, list[float]] = {name: [] for name in setups}
    shuffle = random.Random(0).shuffle
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        gc.collect()
        order = [*seconds]
        shuffle(order)
        for name in order:
            model, optimizer = setups[name]
            start = now(model.device.type)
            try:
                _update(model(**batch).loss, optimizer)
            except torch.OutOfMemoryError:
                if name == FROZEN:
                    raise
                del seconds[name]
            else:
                seconds[name].append(now(model.device.type) - start)
    return seconds


def now(device: str) -> float:
    """The time when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _write(directory: Path, results: dict[str, Any]) -> None:
    (directory / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
    (directory / "bench.md").write_text(table(results["rows"]))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the table says it all; plots are an extra
    rows = [row for row in results["rows"] if "out_of_memory" not in row]
    figure = Figure(figsize=(10, 0.3 * len(rows) + 1.5), layout="constrained")
    panels = figure.subplots(ncols=2, sharey=True)
    for axes, key, unit, label in (
        (panels[0], "step_ratio", 1, "training step, x frozen"),
        (panels[1], "saved_bytes", 2**20, "kept for the backward pass, MiB"),
    ):
        bars = axes.barh([row["method"] for row in rows], [row[key] / unit for row in rows])
        axes.bar_label(bars, fmt="%.2f" if unit == 1 else "%.0f", padding=2)
        axes.set(xlabel=label)
        axes.margins(x=0.12)
    panels[0].invert_yaxis()
    figure.savefig(directory / "bench.png", dpi=150)
