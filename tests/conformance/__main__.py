"""`python -m tests.conformance`: run PEFT's own tests against our methods and print one table."""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .methods import METHODS
from .upstream import PACKAGE, prepare


ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_config",
    "test_token_classification_qa",
    "test_low_level_api",
    "test_mixed",
    "test_trainable_tokens",
    "test_target_parameters",
    "test_quantization",
    "test_torch_compile",
    "test_other",
)
# A fixed part for every commit, as regular expressions over node ids: each kind of layer and of model once.
QUICK = (
    r"MLP-\w+-target_modules=\['lin0', 'lin1'\]\]",
    r"EmbConv1D-\w+-target_modules=\['emb', 'conv1d'\]\]",
    r"EmbConv1D.*trainable_token_indices",
    r"Conv2d-\w+-target_modules=\['conv2d', 'lin0'\]\]",
    r"Conv2dGroups2-\w+-target_modules=\['conv2d'\]\]",
    r"TestMultipleActiveAdapters",
    r"TestMixedAdapterBatches",
    r"test_decoder.*target_modules=None,bias=none-.*(GPT2LMHeadModel|LlamaForCausalLM)",
    r"test_encoder_decoder.*target_modules=None,bias=none-.*T5",
    r"test_feature.*=attention,bias=none-.*BertModel",
    r"test_seq_classifier.*target_modules=None,bias=none-.*BertFor",
    r"test_config",
)
OUTCOMES = ("passed", "failed", "skipped", "xfailed")
Tests = dict[str, dict[str, Any]]


def run(method: str, quick: bool, workers: int, files: list[str], extra: list[str]) -> Tests:
    """Run the tests of one method in a subprocess and return the outcome of each."""
    from .standins import models

    tree = prepare()
    env = os.environ | {
        "HF_HOME": str(models()),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        # The models are tiny: one thread each is fastest, and the same everywhere.
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "report.json"
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
        pytest += ["-p", "tests.conformance.plugin", "-c", str(tree / "pytest.ini"), "--rootdir", str(tree)]
        pytest += ["--method", method, "--report", str(report), *(["-n", str(workers)] if workers else [])]
        pytest += ["--disable-warnings", *(["--only", "|".join(QUICK)] if quick else []), *extra]
        pytest += [str(tree / PACKAGE / f"{file}.py") for file in files]
        code = subprocess.run(pytest, check=False, cwd=ROOT, env=env).returncode
        tests: Tests = json.loads(report.read_text()) if report.exists() else {}
    if code and not any(test["outcome"] == "failed" for test in tests.values()):
        tests[f"pytest exited with code {code}"] = {"outcome": "failed", "reason": "see above", "seconds": 0.0}
    return tests


def _file(node: str) -> str:
    return node.partition("::")[0].rpartition("/")[2].removesuffix(".py")


def _where(node: str, test: dict[str, Any]) -> tuple[str, str, str]:
    """Return file, function and reason of a skip, the same for every method."""
    reason = re.sub(r"<class '[\w.]+'>", "<config>", test["reason"])
    return _file(node), re.split(r"\[|::", node.partition("[")[0])[-1], reason


def summary(results: dict[str, Tests]) -> dict[str, Any]:
    """Method -> how many tests of each file had which outcome, how many were skipped for which reason, what failed."""
    table = {}
    for method, tests in results.items():
        files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for node, test in tests.items():
            files[_file(node)][test["outcome"]] += 1
        skips = collections.Counter(_where(*item)[2] for item in tests.items() if item[1]["outcome"] == "skipped")
        failed = {node: test["reason"] for node, test in tests.items() if test["outcome"] == "failed"}
        total = collections.Counter(test["outcome"] for test in tests.values())
        table[method] = {"all": total, "files": files, "skipped": dict(skips.most_common()), "failed": failed}
    return table


def print_tables(results: dict[str, Tests]) -> None:
    """Print passed, failed and skipped for each file and method, then the reasons of the skips."""
    table = summary(results)
    files = list(dict.fromkeys(file for counts in table.values() for file in counts["files"]))
    head = "  ".join(f"{method:>{4 * 6}}" for method in results)
    print(f"\n{'':34}{head}\n{'':34}" + "  ".join("".join(f"{o[:5]:>6}" for o in OUTCOMES) for _ in results))
    for file in [*files, "all"]:
        cells = []
        for counts in table.values():
            mine = counts["all"] if file == "all" else counts["files"][file]
            cells.append("".join(f"{mine[outcome]:>6}" for outcome in OUTCOMES))
        print(f"{file:34}" + "  ".join(cells))

    lora = {_where(*item)[1:] for item in results.get("lora", {}).items() if item[1]["outcome"] == "skipped"}
    for method, tests in results.items():
        skips = collections.Counter(_where(*item)[1:] for item in tests.items() if item[1]["outcome"] == "skipped")
        reasons: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for (function, reason), count in sorted(skips.items()):
            too = "" if not lora else " (LoRA too)" if (function, reason) in lora else " (LoRA runs)"
            reasons[reason, too].append(f"{count:>6} {function}")
        print(f"\nSkipped, {method}:")
        for (reason, too), counts in reasons.items():
            total = sum(int(count.split()[0]) for count in counts)
            print(
                f"- {reason}{too}", *(counts if len(counts) <= 8 else [f"{total:>6} in {len(counts)} tests"]), sep="\n"
            )
        if failed := table[method]["failed"]:
            print(f"\nFailed, {method}:" + "".join(f"\n- {node}\n    {reason}" for node, reason in failed.items()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--method", nargs="+", action="extend", help=f"of {', '.join(METHODS)}; all if not given")
    parser.add_argument("--quick", action="store_true", help="a fixed part, about a minute")
    parser.add_argument("-n", type=int, default=0, metavar="N", help="number of processes")
    parser.add_argument("--table", type=Path, help="write counts and reasons to this JSON file")
    parser.add_argument(
        "--source", type=Path, help="PEFT's source tree, if not the installed release's from the index"
    )
    parser.add_argument("--files", nargs="+", default=FILES, help="upstream files, without .py")
    args, extra = parser.parse_known_args()

    if args.source:
        os.environ["PEFT_SOURCE"] = str(args.source.resolve())
    results = {method: run(method, args.quick, args.n, args.files, extra) for method in args.method or METHODS}
    print_tables(results)
    if args.table:
        args.table.write_text(json.dumps(summary(results), indent=1) + "\n")
    outcomes = [{test["outcome"] for test in tests.values()} for tests in results.values()]
    return int(any("failed" in seen or "passed" not in seen for seen in outcomes))


if __name__ == "__main__":
    sys.exit(main())
