"""Walk every class of transformers' auto mappings that a small config builds here: `python -m tests.architectures`.

Hours on one core, and resumable: what each class gave is kept in a work file, and a class is tried once. Written to
`benchmarks/results/architectures.json`: how many classes were tried, adapted and refused, and all exceptions.
"""

import argparse
import json
import os
import re
import resource
import signal
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

from .models import model_classes
from .walk import METHODS, walk


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/architectures.json"
SECONDS, MEMORY = 120, 12 << 30  # for one class


def tried(names: list[str]) -> Iterator[dict[str, Any]]:
    """Walk the classes of one model type in processes with limits of time and memory: a new one where one has died."""
    while names:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for name in names:
                signal.alarm(SECONDS)
                try:
                    result: dict[str, Any] = walk(name)
                except Exception as exc:  # noqa: BLE001
                    result = {"not built": str(exc)[:300]}
                os.write(writer, json.dumps({"class": name, **result}).encode() + b"\n")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            for line in pipe:
                names = names[1:]
                yield json.loads(line)
        os.waitpid(child, 0)
        if names:
            yield {"class": names[0], "not built": f"more than {SECONDS} s or {MEMORY >> 30} GiB"}
            names = names[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/architectures.jsonl"), help="what was tried")
    parser.add_argument("--only", default="", help="regular expression of class names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    arguments.work.touch()
    rows = [json.loads(line) for line in arguments.work.read_text().splitlines()]
    done = {row["class"] for row in rows}
    with arguments.work.open("a") as work:
        for model_type, classes in groupby(model_classes(), key=itemgetter(0)):
            names = [name for _, name in classes if name not in done and re.search(arguments.only, name)]
            for row in tried(names):
                rows.append({"type": model_type, **row})
                work.write(json.dumps(rows[-1]) + "\n")
                work.flush()
    RESULTS.write_text(json.dumps(summary(rows), indent=1) + "\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts, and every exception with its reason."""
    built = [row for row in rows if "not built" not in row]
    result: dict[str, Any] = {
        "versions": {"transformers": tf.__version__, "torch": torch.__version__, "peft": peft.__version__},
        "classes": {"tried": len(rows), "built": len(built)},
        "model types": {"tried": len({row["type"] for row in rows}), "built": len({row["type"] for row in built})},
    }
    for method in METHODS:
        of_method = [(row["class"], row[method]) for row in built]
        result[method] = {
            status: sum(given["status"] == status for _, given in of_method)
            for status in ("adapted", "refused", "fault")
        }
        result[method]["exceptions"] = {
            "refused": by_reason((name, given["reason"]) for name, given in of_method if given["status"] == "refused"),
            "fault": by_reason((name, given["reason"]) for name, given in of_method if given["status"] == "fault"),
            "left out": by_reason((name, said) for name, given in of_method for said in given.get("warnings", ())),
            "adapted, but not used by this forward, nor is the bare model's weight": by_reason(
                (name, layer) for name, given in of_method for layer in given.get("unused", ())
            ),
        }
    result["not built"] = by_reason((row["class"], row["not built"]) for row in rows if "not built" in row)
    return result


def by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the classes that share a reason."""
    found: dict[str, list[str]] = {}
    for name, reason in sorted(pairs, key=lambda pair: (pair[1], pair[0])):
        found.setdefault(reason, []).append(name)
    return found


if __name__ == "__main__":
    main()
