"""A few of the mutated files of `python -m tests.attacks.fuzz`."""

from .fuzz import fuzz


def test_mutated_files_load_or_are_refused():
    result = fuzz(200, seed=1)
    assert not result["failures"]
    assert sum(n for outcome, n in result["outcomes"].items() if "refused" in outcome) > 100
