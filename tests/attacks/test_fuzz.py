"""A few of the mutated files of `python -m tests.attacks.fuzz`, and what SECURITY.md says of all of them."""

import json

from .fuzz import ROOT, fuzz


def test_mutated_files_load_or_are_refused():
    result = fuzz(200, seed=1)
    assert not result["failures"]
    assert sum(n for outcome, n in result["outcomes"].items() if "refused" in outcome) > 100


def test_the_numbers_in_prose_are_those_of_the_committed_run():
    result = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text())

    def count(part: str) -> int:
        return sum(n for outcome, n in result["outcomes"].items() if part in outcome)

    loaded, refused, left = count(": loaded"), count(": refused"), count("untrained adapter left")
    assert not result["failures"] and loaded + refused == result["files"]
    said = " ".join((ROOT / "SECURITY.md").read_text().split())
    assert f"`{result['command']}` mutates" in said
    assert f"{loaded:,} loaded, {refused:,} were refused (after {left:,} of these an untrained adapter stayed" in said
