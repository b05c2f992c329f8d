"""Forgetting: what a language model that learns sums loses on a task it was not trained on.

    python -m benchmarks.forgetting

Scores the untrained model, and every model that `hyperadapt compare configs/compare/arithmetic.yaml` has trained at its
method's chosen learning rate, on the task of configs/compare/commonsense.yaml. Writes
benchmarks/results/forgetting.json: the arithmetic scores beside those of the other task, one per seed.
"""

import json
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hyperadapt_peft.training import recipe as recipes
from hyperadapt_peft.training.compare import load
from hyperadapt_peft.training.data import local_path
from hyperadapt_peft.training.train import evaluate


ROOT = Path(__file__).parents[1]


def main() -> None:
    learned, other = (load(ROOT / f"configs/compare/{name}.yaml") for name in ("arithmetic", "commonsense"))
    name = next(iter(other.methods))
    _, values = other.cell(name, other.methods[name]["learning_rates"][0], other.seeds[0])
    recipe = recipes.check(values)
    source = local_path(recipe.model.name)

    def score(directory: Path | None) -> float:
        full = directory is not None and not (directory / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(directory if full else source)
        if directory is not None and not full:
            model = PeftModel.from_pretrained(model, directory)
        return evaluate(recipe, model)["test"][recipe.data.metric]

    results = {"untrained": {"other": [score(None)]}}
    for row in tqdm(json.loads((ROOT / learned.output_dir / "comparison.json").read_text())):
        cells = [learned.cell(row["method"], row["learning_rate"], seed)[0] for seed in learned.seeds]
        adapters = [ROOT / cell / "adapter" for cell in cells]
        scores = [score(adapter) for adapter in adapters if adapter.is_dir()]
        results[row["method"]] = {"learned": row["test"], "other": scores}
        (ROOT / "benchmarks/results/forgetting.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
