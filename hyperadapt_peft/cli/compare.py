"""Compare methods on one task: each over its own learning rates, several seeds, chosen on validation, shown on test."""

import copy
import dataclasses
import json
import multiprocessing.connection
import os
import re
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from hyperadapt_cli import quiet_libraries

from . import recipe as recipes
from .errors import RecipeError
from .train import train


@dataclass(frozen=True)
class Method:
    """What one method has of its own: its `tuner`, its learning rates, and changes of the sections `model` and `training`."""

    tuner: dict[str, Any]
    learning_rates: Annotated[list[float], Field(min_length=1)]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A checked comparison.

    Args:
        recipe: the recipe that all methods share, as plain data; in the YAML file, it or its file's name.
        seeds: the seeds; the learning rate is chosen with the first.
        methods: name -> what the method has of its own.
        output_dir: where the runs and the results go.
    """

    recipe: dict[str, Any] | str
    seeds: Annotated[list[int], Field(min_length=1)]
    methods: Annotated[dict[str, Any], Field(min_length=1)]
    output_dir: Path

    def recipe_of(self, method: str, learning_rate: float, seed: int) -> tuple[Path, dict[str, Any]]:
        """The directory and the recipe of one run."""
        slug = re.sub(r"[^\w.=-]+", "-", method).strip("-")
        directory = self.output_dir / slug / f"lr{learning_rate:g}" / f"seed{seed}"
        values: Any = copy.deepcopy(self.recipe)
        own = self.methods[method]
        values["tuner"] = own.tuner
        values["model"] |= own.model
        values["training"] |= own.training
        values["training"] |= {"learning_rate": learning_rate, "seed": seed, "output_dir": str(directory)}
        return directory, values


def load(path: str | Path) -> Comparison:
    """Read a comparison and check every recipe in it.

    Raises:
        RecipeError: anything in it is wrong; the message is one line that names the key.
    """
    values = recipes.read_yaml(Path(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected the keys {', '.join(Comparison.__annotations__)}")
    recipes.check_fields("", values, Comparison)
    recipe = values["recipe"]
    if isinstance(recipe, str):
        file = Path(path).parent / recipe
        if not file.is_file():
            raise RecipeError(f"recipe: no such file '{recipe}'")
        recipe = recipes.read_sections(file)
    recipes.check_sections({"tuner": {}} | recipe)  # each method has its own tuner
    methods = {name: recipes.make(f"methods.{name}", method, Method) for name, method in values["methods"].items()}
    comparison = Comparison(recipe, values["seeds"], methods, Path(values["output_dir"]))
    for name, method in methods.items():
        _, values = comparison.recipe_of(name, method.learning_rates[0], comparison.seeds[0])
        try:
            checked = recipes.check(values)
        except RecipeError as error:
            raise RecipeError(f"methods.{name}: {error}") from error
        if missing := {"validation", "test"} - checked.data.splits.keys():
            raise RecipeError(
                f"recipe.data.{min(missing)}_split: expected; a comparison chooses on one and shows the other"
            )
    return comparison


def compare(comparison: Comparison) -> list[dict[str, Any]]:
    """Run what has not been run yet, and write `comparison.json`, `comparison.md` and `comparison.png`.

    A run is finished when its `metrics.json` is there; it is then never run again. One that was stopped goes on from
    its last checkpoint. Each runs in a process of its own, so that its peak memory is its own.

    Returns:
        One row per method, in the order of the comparison.

    Raises:
        RecipeError: a finished run in `output_dir` was of another recipe than the comparison has now; nothing has run.
    """
    first, *other_seeds = comparison.seeds
    for name, method in comparison.methods.items():
        for rate in method.learning_rates:
            for seed in comparison.seeds:
                _check_finished(*comparison.recipe_of(name, rate, seed))
    sweeps: dict[str, dict[float, dict[str, Any]]] = {name: {} for name in comparison.methods}
    repeats: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.methods}
    runs = sum(len(method.learning_rates) + len(other_seeds) for method in comparison.methods.values())
    with tqdm(total=runs, desc="runs", unit="run") as bar:

        def run(name: str, learning_rate: float, seed: int) -> dict[str, Any]:
            bar.set_postfix_str(f"{name} lr={learning_rate:g} seed={seed}")
            result = _run(*comparison.recipe_of(name, learning_rate, seed))
            bar.update()
            return result

        def rows() -> list[dict[str, Any]]:
            return [_row(name, sweep, repeats[name]) for name, sweep in sweeps.items() if sweep]

        for name, method in comparison.methods.items():
            for rate in method.learning_rates:
                sweeps[name][rate] = run(name, rate, first)
            _write(comparison, rows())
        for seed in other_seeds:  # all methods under one seed, then under the next: their times are comparable
            for name, sweep in sweeps.items():
                repeats[name].append(run(name, _best(sweep), seed))
                _write(comparison, rows())
    return rows()


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as Markdown: the results, and what each learning rate gave on the validation split."""
    lines = [
        "| method | trained outside the head | adapter, bytes | learning rate | seeds | validation | test | training, s | peak, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['trainable_outside_head']:,} | {row['adapter_bytes']:,} | "
            f"{row['learning_rate']:g} | {len(row['test'])} | {_spread(row['validation'])} | {_spread(row['test'])} | "
            f"{row['seconds']:.0f} | {row['peak_rss_bytes'] / 2**20:.0f} |"
        )
    lines += ["", "| method | learning rate: validation, first seed |", "| --- | --- |"]
    for row in rows:
        sweep = sorted(row["sweep"].items(), key=lambda pair: float(pair[0]))
        lines.append(f"| {row['method']} | {', '.join(f'{rate}: {100 * score:.1f}' for rate, score in sweep)} |")
    return "\n".join(lines) + "\n"


def _spread(scores: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0
    return f"{100 * statistics.mean(scores):.1f} ± {100 * deviation:.1f}"


def _check_finished(directory: Path, values: dict[str, Any]) -> None:
    """Refuse a finished run of another recipe: its result would be shown for this one's."""
    if not (directory / "metrics.json").exists():
        return
    old, new = _flat(_metrics(directory)["recipe"]), _flat(recipes.check(values).resolved)
    if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        what = f"{', '.join(changed)}: changed since {directory} ran"
        raise RecipeError(f"{what}; remove that run, or take another output_dir")


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Section and key -> value, but for where the run was written, which may have moved."""
    task, *sections = recipes.SECTIONS
    flat = {f"{section}.{key}": value for section in sections for key, value in recipe[section].items()}
    del flat["training.output_dir"]
    return flat | {task: recipe[task]}


def _metrics(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "metrics.json").read_text())


def _run(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    if not (directory / "metrics.json").exists():
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=quiet_libraries) as pool:
            pool.submit(_train, values).result()
    return _metrics(directory)


def _train(values: dict[str, Any]) -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        Thread(target=_end_with, args=[parent.sentinel], daemon=True).start()
    train(recipes.check(values), resume=True)


def _end_with(sentinel: int) -> None:
    """End this process with the comparison, or it would write beside the next one that makes the same run."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _score(result: Mapping[str, Any], split: str) -> float:
    return result["after"][split][result.get("metric", "accuracy")]


def _best(sweep: Mapping[float, dict]) -> float:
    return max(sweep, key=lambda rate: _score(sweep[rate], "validation"))


def _row(name: str, sweep: Mapping[float, dict], repeats: list[dict]) -> dict[str, Any]:
    best = _best(sweep)
    results = [sweep[best], *repeats]
    return {
        "method": name,
        "metric": results[0].get("metric", "accuracy"),
        "learning_rate": best,
        "sweep": {f"{rate:g}": _score(result, "validation") for rate, result in sweep.items()},
        "validation": [_score(result, "validation") for result in results],
        "test": [_score(result, "test") for result in results],
        "trainable_outside_head": results[0]["parameters"]["trainable_outside_head"],
        "adapter_bytes": results[0]["adapter_bytes"],
        "seconds": statistics.median(result["seconds"]["train"] for result in results),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
    }


def _write(comparison: Comparison, rows: list[dict[str, Any]]) -> None:
    directory = comparison.output_dir
    (directory / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    finished = [row["method"] for row in rows if len(row["test"]) == len(comparison.seeds)]
    missing = ", ".join(name for name in comparison.methods if name not in finished)
    (directory / "comparison.md").write_text(table(rows) + (f"\nNot finished: {missing}.\n" if missing else ""))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the table says it all; plots are an extra
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        test, trained = [100 * score for score in row["test"]], max(row["trainable_outside_head"], 1)
        mean = statistics.mean(test)
        axes.errorbar(trained, mean, yerr=[[mean - min(test)], [max(test) - mean]], fmt="o", capsize=3)
        axes.annotate(row["method"], (trained, mean), (5, 5), textcoords="offset points")
    metric = rows[0]["metric"].replace("_", " ")
    axes.set(xscale="log", xlabel="trained parameters outside the head", ylabel=f"test {metric}, %")
    axes.margins(x=0.2)  # room for the names
    axes.grid(alpha=0.3)
    figure.savefig(directory / "comparison.png", dpi=150)
