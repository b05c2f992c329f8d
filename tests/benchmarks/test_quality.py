"""Which run comes next: rates around the best one under the first seed, then the best under all."""

import pytest

from benchmarks.quality import METHODS, MOST_RATES, TASKS, file_of, load, next_run
from benchmarks.runs import chosen


@pytest.mark.parametrize("peak", [5e-4, 1e-3, 2e-3, 4e-3, 1.6e-2])
def test_the_best_rate_ends_inside_its_grid_with_all_seeds(peak):
    runs = []
    while following := next_run("HyperAdapt", {"runs": runs}, 3, []):
        rate, seed = following
        assert not [run for run in runs if (run["learning_rate"], run["seed"]) == following]
        validation = 1 - abs(rate - peak) / 100
        runs.append({"method": "HyperAdapt", "learning_rate": rate, "seed": seed, "validation": validation})
    rates = {run["learning_rate"] for run in runs}
    assert min(rates) < peak < max(rates) and METHODS["HyperAdapt"].rate in rates
    best = chosen(runs)["HyperAdapt"]
    assert sorted(best) == [0, 1, 2] and {run["learning_rate"] for run in best.values()} == {peak}


def test_a_rate_that_fails_with_a_second_seed_is_left():
    runs = []
    while following := next_run("HyperAdapt", {"runs": runs}, 3, []):
        rate, seed = following
        validation = {1e-3: 0.8, 2e-3: 0.0 if seed else 0.9}.get(rate, 0.1)
        runs.append({"method": "HyperAdapt", "learning_rate": rate, "seed": seed, "validation": validation})
    assert {run["learning_rate"] for run in chosen(runs)["HyperAdapt"].values()} == {1e-3}


def test_where_no_rate_learns_higher_ones_are_tried_and_not_forever():
    runs = []
    while following := next_run("HyperAdapt", {"runs": runs}, 3, []):
        rate, seed = following
        runs.append({"method": "HyperAdapt", "learning_rate": rate, "seed": seed, "validation": 0.7})
    rates = sorted({run["learning_rate"] for run in runs})
    assert len(rates) == MOST_RATES and rates[0] == METHODS["HyperAdapt"].rate / 2
    assert len(runs) == MOST_RATES + 2


def test_given_rates_have_all_seeds_and_no_others_run():
    runs = []
    while following := next_run("HyperAdapt", {"runs": runs}, 2, [1e-4, 2e-4]):
        runs.append(dict(zip(("learning_rate", "seed"), following, strict=True), method="HyperAdapt", validation=0.5))
    assert [(run["learning_rate"], run["seed"]) for run in runs] == [(1e-4, 0), (2e-4, 0), (1e-4, 1), (2e-4, 1)]


# whose searches are not done
UNFINISHED = {
    *((task, "LoRA r=8") for task in ("claims", "social-choices", "word-problems")),  # which taught it nothing
    *(("sums", method) for method in ("C3A", "MiSS r=1")),
    ("tweets", "C3A"),
}


@pytest.mark.parametrize("task", [task for task in TASKS if file_of(task).exists()])
def test_the_committed_runs_are_of_the_committed_recipe_and_their_searches_done(task):
    results = load(task)
    ran = {run["method"] for run in results["runs"]} & METHODS.keys()
    unfinished = {(task, method) for method in ran if next_run(method, results, 3, [])}
    assert unfinished == {pair for pair in UNFINISHED if pair[0] == task}
