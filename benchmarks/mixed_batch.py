"""A thousand adapters on one model: loading, memory, switching, and a batch of many of them, beside LoRA r=8.

    python -m benchmarks.mixed_batch [--rows 64] [--loaded 64 1000] [--rounds 5]

The model is a 12-layer, 768-wide encoder with every linear layer adapted. The variants of a batch are measured in turn
in one process; the ratios are medians over the rounds. LoRA's adapters are copied into the layers, as loading them by
PEFT would take hours; `seconds of one more by load_adapter` is what PEFT's call takes for each method. Writes
benchmarks/results/mixed_batch.json; runs of other settings there are kept.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertModel

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.adapters.loading import load_adapters
from hyperadapt_peft.tuners.hyperadapt import HyperAdaptLayer


CONFIGS = {
    "HyperAdapt": lambda: HyperAdaptConfig(init_weights=False),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
}
FILES = 64  # different adapter files; a thousand adapters are loaded from them in turn


def rss() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def clock(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy_lora(model: nn.Module, adapters: int) -> None:
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for i in tqdm(range(1, adapters), desc="copying LoRA", leave=False):
        for layer in layers:
            for container in (*layer._modules.values(), *vars(layer).values()):
                if isinstance(container, (dict, nn.ModuleDict)) and "adapter0" in container:
                    container[f"adapter{i}"] = copy.deepcopy(container["adapter0"])
        model.peft_config[f"adapter{i}"] = model.peft_config["adapter0"]


def loaded_model(method: str, adapters: int, directory: Path):
    """The model with that many adapters, and what loading them took."""
    base = BertModel(BertConfig())
    model = get_peft_model(base, CONFIGS[method]())
    for i in range(FILES if method == "HyperAdapt" else 1):
        torch.manual_seed(i)
        for layer in model.modules():
            if isinstance(layer, HyperAdaptLayer):
                layer.reset_parameters("default", init_weights=False)
        model.save_pretrained(directory / str(i))
    model = PeftModel.from_pretrained(model.unload(), directory / "0", "adapter0")
    before, row = rss(), {}
    if method == "HyperAdapt":
        paths = {f"adapter{i}": directory / str(i % FILES) for i in range(1, adapters)}
        row["seconds of load_adapters"] = clock(lambda: load_adapters(model, paths))
    else:
        copy_lora(model, adapters)
    row["bytes of memory per adapter"] = (rss() - before) // (adapters - 1)
    row["bytes on disk per adapter"] = (directory / "0" / "adapter_model.safetensors").stat().st_size
    row["seconds of one more by load_adapter"] = clock(lambda: model.load_adapter(directory / "0", "more"))
    return model.eval(), row


@torch.no_grad()
def measure(model, rows: int, tokens: int, rounds: int) -> dict[str, float]:
    ids = torch.randint(1000, 20000, (rows, tokens))
    model.set_adapter("adapter0")
    variants = {
        "one active": {},
        "one by name": {"adapter_names": ["adapter0"] * rows},
        "all different": {"adapter_names": [f"adapter{i}" for i in range(rows)]},
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, kwargs in variants.items():
            seconds = clock(lambda kwargs=kwargs: model(input_ids=ids, **kwargs))
            if i:  # the first round warms up
                times[name].append(seconds)
    switches = [clock(lambda name=name: model.set_adapter(name)) for name in ("adapter1", "adapter0") * 3]
    ratios = [many / one for many, one in zip(times["all different"], times["one active"], strict=True)]
    return {
        **{f"seconds, {name}": statistics.median(seconds) for name, seconds in times.items()},
        "ratio of all different to one active": statistics.median(ratios),
        "seconds of set_adapter": statistics.median(switches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--loaded", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / "mixed_batch.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for loaded in args.loaded:
        for method in args.methods:
            setting = {"method": method, "loaded": loaded, "rows": args.rows, "tokens": args.tokens}
            with tempfile.TemporaryDirectory() as directory:
                model, row = loaded_model(method, loaded, Path(directory))
            row = {**setting, **row, **measure(model, args.rows, args.tokens, args.rounds)}
            print(json.dumps(row))
            runs = [run for run in runs if any(run[key] != setting[key] for key in setting)] + [row]
            del model
    results = {
        "command": f"python -m benchmarks.mixed_batch {' '.join(sys.argv[1:])}".strip(),
        "threads": torch.get_num_threads(),
        "runs": sorted(runs, key=lambda run: (run["loaded"], run["method"])),
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
