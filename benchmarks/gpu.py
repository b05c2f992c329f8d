"""All that a GPU should show: steps, kernels and peak memory of models of real size, beside the plan's prediction.

    python -m benchmarks.gpu [--models llama-3.2-3b] [--runs bf16]

The models have the shapes of Llama-3.2-3B, Llama-3.1-8B and Qwen2.5-14B and random weights, so nothing is downloaded.
Batches are 4 x 1,024 tokens; in the run `small-batch`, where the time is that of launches, 1 x 128. Each run's
`bench.json` and `bench.md` go to benchmarks/results/gpu/<model>-<run>, and to memory.json there what each method needed and
what `plan` says, in bytes, weights and optimizer included. A run that has its `bench.json` is not repeated: give
`--output-dir` for new ones. `--device cpu --small` runs the same code on tiny models.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from hyperadapt_peft.cli.bench import FROZEN, METHODS, bench
from hyperadapt_peft.cli.plan import plan


LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072}
MODELS: dict[str, PretrainedConfig] = {
    "llama-3.2-3b": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        tie_word_embeddings=True, **LLAMA_3,
    ),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **LLAMA_3
    ),
    "qwen2.5-14b": Qwen2Config(
        hidden_size=5120, intermediate_size=13_824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152_064, max_position_embeddings=32_768,
    ),
}  # fmt: skip
SMALL: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
}
METHODS_HERE = (
    "hyperadapt", "hyperadapt-save-memory", "surm-kronecker", "lora-r8", "miss-r8", "ia3", "road", "vera-r256"
)  # fmt: skip
ALL_LINEAR = {"target_modules": "all-linear"}
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "bf16-checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "small-batch": {"dtype": "bfloat16", "batch_size": 1, "sequence_length": 128},
    "autocast": {"dtype": "float32", "autocast": True},
}
FP32_LIMIT = 5e9  # parameters whose float32 copy, its bf16 one and the activations fit a card of 80 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny models and batches")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of real size")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results/gpu"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; `--device cpu --small` runs the same code on tiny models")
    # what does not fit is then too much, not scattered
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    length, rounds = (16, 2) if args.small else (1024, 5)
    memory = args.output_dir / "memory.json"
    for name, config in (SMALL if args.small else {name: MODELS[name] for name in args.models}).items():
        for run in args.runs:
            options = {"batch_size": 4, "sequence_length": length} | RUNS[run]
            directory = args.output_dir / f"{name}-{run}"
            if (directory / "bench.json").exists():
                continue
            base = plan(config, {"peft_type": "FULL"}, dtype=options["dtype"])
            if options["dtype"] == "float32" and base.parameters > FP32_LIMIT:
                continue
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / "config.json"
            path.write_text(config.to_json_string(use_diff=False))
            results = bench(
                str(path), rounds=rounds, methods=METHODS_HERE, output_dir=directory, device=args.device, **options
            )
            if run == "bf16":
                compared = json.loads(memory.read_text()) if memory.exists() else {}
                compared[name] = {
                    row["method"]: {
                        "planned": plan(config, ALL_LINEAR | METHODS[row["method"]], **options).total_bytes,
                        "measured": base.weights_bytes + row["peak_bytes"] if "peak_bytes" in row else None,
                    }
                    for row in results["rows"]
                    if row["method"] != FROZEN
                }
                memory.write_text(json.dumps(compared, indent=1) + "\n")


if __name__ == "__main__":
    main()
