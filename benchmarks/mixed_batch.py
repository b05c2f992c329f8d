"""Many adapters on one small Llama: a batch of 64 of them, generation, loading and memory, beside LoRA r=8.

    python -m benchmarks.mixed_batch [--loaded 64 1000] [--rounds 40] [--methods HyperAdapt "LoRA r=8"] [--device cuda]

The model has 4 layers of width 384, every linear layer adapted: small, so that what adapters cost beside the base layers
shows. What is compared runs in turn in one thread, whose CPU time is measured, so that a busy machine does not matter
much; a ratio is the median of the rounds' ratios. LoRA's adapters are
copied into the layers, as loading 1,000 by PEFT would take hours; `seconds of one more by load_adapter` is PEFT's call.
Writes benchmarks/results/mixed_batch.json; runs of other methods and numbers of adapters there are kept. With `--device cuda`
the model has the shape of Llama-3.2-3B, in bf16, the time is the clock's, and the file is gpu/mixed_batch.json.
"""

import argparse
import copy
import json
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu import MODELS
from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.adapters.loading import load_adapters
from hyperadapt_peft.cli.bench import now
from hyperadapt_peft.tuners.hyperadapt import HyperAdaptLayer


CONFIGS = {
    "HyperAdapt": lambda: HyperAdaptConfig(init_weights=False, task_type="CAUSAL_LM"),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
}
FILES = 64  # different adapter files; a thousand adapters are loaded from them in turn
ROWS = 64


def llama(device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if device == "cuda":
        with torch.device(device):
            return AutoModelForCausalLM.from_config(MODELS["llama-3.2-3b"], dtype=torch.bfloat16).eval()
    config = LlamaConfig(
        hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1024, vocab_size=1024,
        max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def memory() -> int:
    """Resident memory of this process in bytes, or what torch has on the GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def clock(action: Callable[[], Any]) -> float:
    """The seconds that an action takes: this process's, or the clock's until the GPU has done it."""
    read = partial(now, "cuda") if torch.cuda.is_initialized() else time.process_time
    start = read()
    action()
    return read() - start


def copy_lora(model: nn.Module, adapters: int) -> None:
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for i in tqdm(range(1, adapters), desc="copying LoRA", leave=False):
        for layer in layers:
            for container in (*layer._modules.values(), *vars(layer).values()):
                if isinstance(container, (dict, nn.ModuleDict)) and "adapter0" in container:
                    container[f"adapter{i}"] = copy.deepcopy(container["adapter0"])
        model.peft_config[f"adapter{i}"] = model.peft_config["adapter0"]


def loaded_model(method: str, adapters: int, directory: Path, device: str) -> tuple[PeftModel, dict[str, Any]]:
    """The model with that many adapters, and what loading them took."""
    model = get_peft_model(llama(device), CONFIGS[method]())
    for i in range(FILES if method == "HyperAdapt" else 1):
        torch.manual_seed(i)
        for layer in model.modules():
            if isinstance(layer, HyperAdaptLayer):
                layer.reset_parameters("default", init_weights=False)
        model.save_pretrained(directory / str(i))
    model = PeftModel.from_pretrained(model.unload(), directory / "0", "adapter0")
    before, row = memory(), {}
    if method == "HyperAdapt":
        paths = {f"adapter{i}": directory / str(i % FILES) for i in range(1, adapters)}
        row["seconds of load_adapters"] = clock(lambda: load_adapters(model, paths))
    else:
        copy_lora(model, adapters)
    row["bytes of memory per adapter"] = (memory() - before) // (adapters - 1)
    row["bytes on disk per adapter"] = (directory / "0" / "adapter_model.safetensors").stat().st_size
    row["seconds of one more by load_adapter"] = statistics.median(
        clock(lambda i=i: model.load_adapter(directory / "0", f"more{i}")) for i in range(3)
    )
    return model.eval(), row


def compare(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, and their ratios to the first, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 2):
        for name, action in variants.items():
            seconds = clock(action)
            if i > 1:  # the first rounds warm up
                times[name].append(seconds)
    first, *others = times
    ratios = {
        f"{name} / {first}": statistics.median(a / b for a, b in zip(times[name], times[first], strict=True))
        for name in others
    }
    return {f"milliseconds, {name}": 1000 * statistics.median(seconds) for name, seconds in times.items()} | ratios


@torch.no_grad()
def measure(model: PeftModel, rounds: int) -> dict[str, float]:
    model.set_adapter("adapter0")
    many = [f"adapter{i}" for i in range(ROWS)]
    device = model.device.type
    base, results = llama(device), {}
    for kind, tokens in (("prefill of 16 tokens", 16), ("single token", 1)):
        ids = torch.randint(3, 1024, (ROWS, tokens), device=device)
        results |= compare(
            {
                f"{kind}, one adapter": lambda ids=ids: model(input_ids=ids),
                f"{kind}, one by name": lambda ids=ids: model(input_ids=ids, adapter_names=["adapter0"] * ROWS),
                f"{kind}, {ROWS} adapters": lambda ids=ids: model(input_ids=ids, adapter_names=many),
            },
            rounds,
        )
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    one, ids = (torch.randint(3, 1024, (rows, 16), device=device) for rows in (1, ROWS))
    results |= compare(
        {
            "generation of 16 tokens, base": lambda: base.generate(input_ids=one, **options),
            "generation of 16 tokens, one adapter": lambda: model.generate(input_ids=one, **options),
        },
        rounds,
    )
    results |= compare(
        {
            f"generation in {ROWS} rows, one adapter": lambda: model.generate(input_ids=ids, **options),
            f"generation in {ROWS} rows, {ROWS} adapters": lambda: model.generate(
                input_ids=ids, adapter_names=many, **options
            ),
        },
        rounds // 4,
    )
    switches = [clock(lambda name=name: model.set_adapter(name)) for name in ("adapter1", "adapter0") * 3]
    return results | {"milliseconds of set_adapter": 1000 * statistics.median(switches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loaded", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(__file__).parent / "results" / ("gpu" if args.device == "cuda" else "") / "mixed_batch.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    command = shlex.join(["python", "-m", "benchmarks.mixed_batch", *sys.argv[1:]])
    commands, runs = results.get("commands", {}), results.get("runs", [])
    for loaded in args.loaded:
        for method in args.methods:
            with tempfile.TemporaryDirectory() as directory:
                model, row = loaded_model(method, loaded, Path(directory), args.device)
            row = {"method": method, "loaded": loaded, **row, **measure(model, args.rounds)}
            print(json.dumps(row, indent=1))
            runs = [run for run in runs if (run["method"], run["loaded"]) != (method, loaded)] + [row]
            del model
    results = {
        "commands": commands | dict.fromkeys(args.methods, command),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "runs": sorted(runs, key=lambda run: (run["loaded"], run["method"])),
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
