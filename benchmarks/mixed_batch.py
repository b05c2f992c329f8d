"""Forward time of a batch whose rows use many adapters, beside one adapter, for HyperAdapt and LoRA r=8.

    python -m benchmarks.mixed_batch [--rows 64] [--loaded 64 1000] [--rounds 7]

All variants are measured in turn in one process; the ratios are medians over the rounds. Writes
benchmarks/results/mixed_batch.json.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import BertConfig, BertModel

from hyperadapt_peft import HyperAdaptConfig


CONFIGS = {
    "HyperAdapt": lambda: HyperAdaptConfig(init_weights=False),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
}


def rss() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def loaded_model(config, adapters: int):
    """A 12-layer, 768-wide encoder with that many adapters, and what adding them took."""
    model = BertModel(BertConfig())
    before, start = rss(), time.perf_counter()
    model = get_peft_model(model, config(), "adapter0")
    for i in tqdm(range(1, adapters), desc=f"loading {type(config()).__name__}", leave=False):
        model.add_adapter(f"adapter{i}", config())
    seconds = time.perf_counter() - start
    return model.eval(), {"load_seconds": seconds, "memory_bytes": rss() - before}


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
            start = time.perf_counter()
            model(input_ids=ids, **kwargs)
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    switches = []
    for name in ("adapter1", "adapter0") * 3:
        start = time.perf_counter()
        model.set_adapter(name)
        switches.append(time.perf_counter() - start)
    ratios = [many / one for many, one in zip(times["all different"], times["one active"], strict=True)]
    return {
        **{f"seconds, {name}": statistics.median(seconds) for name, seconds in times.items()},
        "ratio of all different to one active": statistics.median(ratios),
        "switch_seconds": statistics.median(switches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--loaded", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    args = parser.parse_args()
    results = {"command": f"python -m benchmarks.mixed_batch {' '.join(sys.argv[1:])}".strip(), "runs": []}
    for loaded in args.loaded:
        for method in args.methods:
            model, row = loaded_model(CONFIGS[method], loaded)
            row = {"method": method, "loaded": loaded, **row, **measure(model, args.rows, args.tokens, args.rounds)}
            print(json.dumps(row))
            results["runs"].append(row)
            del model
    path = Path(__file__).parent / "results" / "mixed_batch.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
