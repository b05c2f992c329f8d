"""A quick part of PEFT's own tests, on every run; `make conformance` runs all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .methods import OURS


ROOT = Path(__file__).resolve().parents[2]
AT_LEAST = {"hyperadapt": 400, "surm": 280}


@pytest.mark.parametrize("method", OURS)
def test_peft_s_own_tests_pass(method, tmp_path):
    """No failure, and enough passed: where PEFT's tests cannot be fetched this fails, it does not skip."""
    command = [sys.executable, "-m", "tests.conformance", "--quick", "--method", method, "-n", "2"]
    done = subprocess.run(
        [*command, "--table", tmp_path / "table.json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    outcomes = json.loads((tmp_path / "table.json").read_text())[method]["all"]
    assert "failed" not in outcomes
    assert outcomes["passed"] >= AT_LEAST[method]
