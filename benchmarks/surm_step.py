"""Training step time of SURM on query, key and value of the quickstart's encoder, as ratios to LoRA r=8 there.

    python -m benchmarks.surm_step [--rounds 15] [--precision fp32 bf16]

Batches of 32 sentences of 40 tokens; forward, backward and AdamW. The methods take turns step by step in one process;
the ratios are medians over the rounds. `fft alone` is the time of the circulant products without the model.
Writes benchmarks/results/surm_step.json.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import trange
from transformers import AutoModelForSequenceClassification

from benchmarks import embedded
from hyperadapt_peft import SurmConfig
from hyperadapt_peft.tuners.surm.structures import Circulant


TARGETS = ["query", "key", "value"]
METHODS = {
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"),
    "LoRA r=1": lambda: LoraConfig(r=1, target_modules=TARGETS, task_type="SEQ_CLS"),
    "circulant": lambda: SurmConfig(structure="circulant", target_modules=TARGETS, task_type="SEQ_CLS"),
    "toeplitz": lambda: SurmConfig(structure="toeplitz", target_modules=TARGETS, task_type="SEQ_CLS"),
    "kronecker": lambda: SurmConfig(structure="kronecker", target_modules=TARGETS, task_type="SEQ_CLS"),
    "ldr r=1": lambda: SurmConfig(structure="ldr", target_modules=TARGETS, task_type="SEQ_CLS"),
}


def step(model, optimizer, batch) -> float:
    start = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def products(layers: int, x: torch.Tensor) -> float:
    width = x.shape[-1]
    factors = [torch.randn(width, requires_grad=True) for _ in range(2)]
    start = time.perf_counter()
    for _ in range(3 * layers):
        Circulant().matmul(x, *factors, width).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    args = parser.parse_args()
    source = embedded.prepare("minilm")
    batch = {
        "input_ids": torch.randint(1000, 20000, (32, 40)),
        "attention_mask": torch.ones(32, 40, dtype=torch.long),
        "labels": torch.randint(0, 2, (32,)),
    }
    models = {}
    for name, config in METHODS.items():
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(source), config()).train()
        models[name] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    results = {"command": f"python -m benchmarks.surm_step {' '.join(sys.argv[1:])}".strip()}
    for precision in args.precision:
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        times: dict[str, list[float]] = {name: [] for name in [*models, "fft alone"]}
        x = torch.randn(32 * 40, 384, requires_grad=True)
        for i in trange(args.rounds + 2, desc=precision):
            for name, (model, optimizer) in models.items():
                with autocast:
                    seconds = step(model, optimizer, batch)
                if i >= 2:
                    times[name].append(seconds)
            if i >= 2:
                times["fft alone"].append(products(6, x))
        ratios = {
            name: round(statistics.median(a / b for a, b in zip(seconds, times["LoRA r=8"], strict=True)), 3)
            for name, seconds in times.items()
        }
        medians = {name: round(statistics.median(seconds), 4) for name, seconds in times.items()}
        results[precision] = {"seconds": medians, "ratio to LoRA r=8": ratios}
        print(json.dumps({precision: results[precision]}, indent=2))
    path = Path(__file__).parent / "results" / "surm_step.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
