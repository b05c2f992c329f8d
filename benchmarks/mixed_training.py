"""Many adapters trained by one run: a step's time beside one adapter's with as many rows, and beside a run for each.

    python -m benchmarks.embedded minilm
    python -m benchmarks.mixed_training [--rounds 20]

The encoder is MiniLM with every linear layer adapted and a head for each adapter, the batch 64 rows of 32 tokens: 16
adapters with 4 rows each, and 4 with 16. A step is forward, backward and AdamW; what is compared runs in turn in one
thread, whose CPU time is measured. Writes benchmarks/results/mixed_training.json: milliseconds per sample, and the
medians of the rounds' ratios.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from benchmarks.mixed_batch import compare
from hyperadapt_peft import HyperAdaptConfig


ROOT = Path(__file__).parents[1]
ADAPTERS = (16, 4)
ROWS, TOKENS = 64, 32


def adapted(names: list[str]) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(ROOT / ".cache/embedded/minilm", num_labels=2)
    model = get_peft_model(model, HyperAdaptConfig(task_type="SEQ_CLS"), names[0])
    for name in names[1:]:
        model.add_adapter(name, HyperAdaptConfig(task_type="SEQ_CLS"))
    model.set_requires_grad(names)
    return model.train()


def step_of(names: list[str], rows: int, **kwargs: list[str]) -> Callable[[], None]:
    model = adapted(names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids, labels = torch.randint(1000, 20000, (rows, TOKENS)), torch.randint(2, (rows,))

    def step() -> None:
        logits = model(input_ids=ids, **kwargs).logits
        F.cross_entropy(logits, labels, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(adapters: int, rounds: int) -> dict[str, float]:
    """Milliseconds per sample, and the medians of the rounds' ratios."""
    names, each = [f"adapter{i}" for i in range(adapters)], ROWS // adapters
    own = step_of(names[:1], each)
    measured = compare(
        {
            f"one adapter, {ROWS} rows": step_of(names[:1], ROWS),
            f"{adapters} adapters, {each} rows each": step_of(
                names, ROWS, adapter_names=[name for name in names for _ in range(each)]
            ),
            f"{adapters} runs of {each} rows": lambda: [own() for _ in names],
        },
        rounds,
    )
    return {
        key.replace("milliseconds", "milliseconds per sample"): value / ROWS if "milliseconds" in key else value
        for key, value in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "command": f"python -m benchmarks.mixed_training {' '.join(sys.argv[1:])}".strip(),
        "torch": torch.__version__,
        "runs": {f"{adapters} adapters": measure(adapters, args.rounds) for adapters in tqdm(ADAPTERS, unit="set-up")},
    }
    print(json.dumps(results, indent=2))
    (ROOT / "benchmarks/results/mixed_training.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
