"""The runs that `benchmarks.quality` keeps, by method, rate and seed; imports nothing heavy."""

import statistics
from typing import Any


Seeds = dict[int, dict[str, Any]]  # seed -> run


def by_rate(runs: list[dict[str, Any]]) -> dict[str, dict[float, Seeds]]:
    """Method -> rate, the lowest first -> seed -> run."""
    methods: dict[str, dict[float, Seeds]] = {}
    for run in runs:
        methods.setdefault(run["method"], {}).setdefault(run["learning_rate"], {})[run["seed"]] = run
    return {method: dict(sorted(rates.items())) for method, rates in methods.items()}


def mean(seeds: Seeds, split: str) -> float:
    """The mean score on a split over the seeds."""
    return statistics.mean(run[split] for run in seeds.values())


def trained(seeds: Seeds) -> int:
    """How many parameters a method trains outside the head."""
    return next(iter(seeds.values()))["trainable_outside_head"]


def differences(ours: Seeds, theirs: Seeds) -> list[float]:
    """The differences on test, in points, of the seeds that both have."""
    return [100 * (ours[seed]["test"] - theirs[seed]["test"]) for seed in ours.keys() & theirs.keys()]


def best_rate(rates: dict[float, Seeds]) -> float:
    """The rate with the best mean validation score over the seeds it has; of equals the lowest."""
    return max(rates, key=lambda rate: mean(rates[rate], "validation"))


def chosen(runs: list[dict[str, Any]]) -> dict[str, Seeds]:
    """Method -> its runs at its best rate, by seed."""
    return {method: rates[best_rate(rates)] for method, rates in by_rate(runs).items()}
