"""All that a GPU should show: steps, kernels and peak memory of models of real size, beside the plan's prediction.

    python -m benchmarks.gpu

The models have the shapes of Llama-3.2-3B, Llama-3.1-8B and Qwen2.5-14B and random weights, so nothing is downloaded.
Batches are 4 x 1,024 tokens. Each run's `bench.json` and `bench.md` go to benchmarks/results/gpu/<model>-<run>, and one
table of peak memory to memory.md. `--device cpu --small` runs the same code on tiny models.
"""

import argparse
from pathlib import Path
from typing import Any

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
METHODS_HERE = ("hyperadapt", "hyperadapt-save-memory", "lora-r8", "miss-r8", "ia3", "vera-r256")
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "bf16-checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "autocast": {"dtype": "float32", "autocast": True},
}
FP32_LIMIT = 10e9  # parameters whose float32 copy fits a card of 80 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="tiny models and batches")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results/gpu"))
    args = parser.parse_args()
    length, rounds = (16, 2) if args.small else (1024, 11)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = [
        "Peak memory of a training step, weights and optimizer included, in GiB; the plan is the least that it needs.\n",
        "| model | run | method | plan | measured |\n| --- | --- | --- | ---: | ---: |",
    ]
    for name, config in (SMALL if args.small else MODELS).items():
        path = args.output_dir / f"{name}.json"
        path.write_text(config.to_json_string(use_diff=False))
        for run, options in RUNS.items():
            shape = {"batch_size": 4, "sequence_length": length, "dtype": options["dtype"]}
            whole = plan(config, {"peft_type": "FULL"}, **shape)
            if options["dtype"] == "float32" and whole.parameters > FP32_LIMIT:
                continue
            results = bench(
                str(path), rounds=rounds, methods=METHODS_HERE, output_dir=args.output_dir / f"{name}-{run}",
                device=args.device, **shape | options,
            )  # fmt: skip
            for row in results["rows"]:
                if row["method"] != FROZEN:
                    planned = None if len(options) > 1 else plan(config, METHODS[row["method"]], **shape).total_bytes
                    measured = None if "out_of_memory" in row else whole.weights_bytes + row["peak_bytes"]
                    cells = [_gib(planned, "not planned"), _gib(measured, "out of memory")]
                    lines.append(f"| {name} | {run} | {row['method']} | {' | '.join(cells)} |")
            (args.output_dir / "memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _gib(size: int | None, otherwise: str) -> str:
    return otherwise if size is None else f"{size / 2**30:.3g}"


if __name__ == "__main__":
    main()
