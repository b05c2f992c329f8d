"""`python -m tests.compatibility`: run a part of the tests under other versions, each in an environment of its own.

    python -m tests.compatibility [--only 3.12 ...] [--environments DIR] [--keep]

Writes benchmarks/results/compatibility.json and prints it as a table. The ranges in pyproject.toml promise no more than
the rows below have shown. An interpreter `python3.X` must be on the path for each row; a row without one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
VERSIONED = ("torch", "transformers", "peft")
ROWS = (  # Python and the versions of VERSIONED
    ("3.10", "2.6.0", "5.0.0", "0.21.0"),  # all oldest
    ("3.11", "2.13.0", "5.0.0", "0.21.0"),
    ("3.11", "2.13.0", "5.23.0", "0.21.2"),
    ("3.12", "2.6.0", "5.23.0", "0.21.2"),
    ("3.13", "2.14.1", "5.23.0", "0.21.2"),  # all newest
)
OTHERS = ("accelerate", "datasets", "pillow", "pytest", "pyyaml", "scikit-learn", "scipy", "setuptools>=77")
# Registration, saving and loading, merging, mixed batches, training and resuming, of both methods.
TESTS = (
    "tests/golden",
    "tests/tuners/hyperadapt/test_functional.py",
    "tests/tuners/hyperadapt/test_merge.py",
    "tests/tuners/hyperadapt/test_mixed_batch.py",
    "tests/integrations/test_transformers.py",
    "tests/integrations/test_peft_features.py",
    "tests/tuners/surm/test_layer.py",
    "tests/integrations/test_peft.py",
    "tests/cli/test_train.py::test_sequence_classification",
    "tests/cli/test_train.py::test_a_resumed_run_equals_an_uninterrupted_one",
)


def environment(directory: Path, row: tuple[str, ...]) -> Path:
    """Make the virtual environment of a row, unless an earlier run kept it; returns its interpreter."""
    python, ready = directory / "bin" / "python", directory / "ready"
    if not ready.exists():
        interpreter = shutil.which(f"python{row[0]}")
        if interpreter is None:
            raise FileNotFoundError(f"there is no python{row[0]} on the path")
        subprocess.run([interpreter, "-m", "venv", "--clear", directory], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        pinned = [f"{name}=={version}" for name, version in zip(VERSIONED, row[1:], strict=True)]
        subprocess.run([*pip, *pinned, *OTHERS], check=True)
        # without its dependencies: a row may try what pyproject.toml does not promise yet
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)
        ready.touch()
    return python


def run(row: tuple[str, ...], directory: Path) -> dict[str, Any]:
    """Run the tests in the environment of a row; returns the row's entry of the results."""
    started = time.monotonic()
    entry: dict[str, Any] = dict(zip(("python", *VERSIONED), row, strict=True))
    try:
        python = environment(directory, row)
    except (OSError, subprocess.CalledProcessError) as error:
        return {**entry, "outcome": f"not run: {error}"}
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    variables["PATH"] = f"{python.parent}{os.pathsep}{variables['PATH']}"
    options = ["-q", "--tb=short", "--show-capture=no", "-W", "ignore", "-p", "no:cacheprovider"]
    command = [python, "-m", "pytest", *options, *TESTS]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    last = (result.stdout.strip().splitlines() or [""])[-1]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
    entry |= {"outcome": "failed" if result.returncode else "passed", **counts}
    return {**entry, "seconds": round(time.monotonic() - started)}


def table(entries: list[dict[str, Any]]) -> str:
    lines = ["| Python | torch | transformers | PEFT | tests passed |", "| --- | --- | --- | --- | ---: |"]
    for entry in entries:
        tests = f"{entry.get('passed', 0)}" if entry["outcome"] == "passed" else f"**{entry['outcome']}**"
        lines.append(f"| {entry['python']} | {' | '.join(entry[name] for name in VERSIONED)} | {tests} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility")
    parser.add_argument("--only", nargs="+", default=[""], help="run only rows whose versions, joined by -, start so")
    parser.add_argument("--environments", type=Path, help="where the environments are made (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep each environment, of some GB, for the next run")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    entries = {tuple(entry[key] for key in ("python", *VERSIONED)): entry for entry in known}
    with tempfile.TemporaryDirectory() as temporary:
        for row in ROWS:
            if not "-".join(row).startswith(tuple(args.only)):
                continue
            directory = (args.environments or Path(temporary)) / "-".join(row)
            entries[row] = run(row, directory)
            print(entries[row], flush=True)
            if not args.keep:
                shutil.rmtree(directory, ignore_errors=True)
            ordered = [entries[other] for other in ROWS if other in entries]
            results = {"command": "python -m tests.compatibility", "tests": TESTS, "rows": ordered}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(ordered))
    return int(any(entry["outcome"] != "passed" for entry in ordered))


if __name__ == "__main__":
    sys.exit(main())
