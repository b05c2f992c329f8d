"""The pytest plugin that runs PEFT's tests with one method's rows. Load with `-p tests.conformance.plugin`."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from _pytest.unittest import TestCaseFunction
from huggingface_hub import try_to_load_from_cache
from peft.utils import save_and_load

from .methods import EXCLUDED, IN_PLACE_OF_LORA, METHODS, Method, config_in_place_of_lora, label, rows
from .upstream import PACKAGE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", choices=list(METHODS), required=True)
    parser.addoption("--only", default="", help="a regular expression over node ids: the tests to run")
    parser.addoption("--report", type=Path, help="write every test's outcome to this JSON file")


class Conformance:
    """Puts the method's rows in upstream's tables and leaves out what has no row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.method: Method = METHODS[name]()
        self.selected: set[str] = set()  # node ids, without the parameters, of the tests that have a row of ours
        self.in_place: set[str] = set()  # and of those with our config in the place of LoRA's
        builtins.under_test = self.under_test  # type: ignore[attr-defined]  # upstream.PATCHES asks for it

    def under_test(self, capability: str) -> tuple[type, ...]:
        """Return the config class under test, as a tuple, if its method has the capability."""
        return (self.method.config_cls,) if capability in self.method.capabilities else ()

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Replace the rows of every table over PEFT methods."""
        marks = metafunc.definition.own_markers
        for i, mark in enumerate(marks):
            if mark.name != "parametrize":
                continue
            names, table = mark.args
            columns = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            table = list(table)
            module = metafunc.module.__name__.rpartition(".")[2]
            ours = rows(self.method, module, columns, table)
            if ours is None:
                continue
            if ours:
                self.selected.add(metafunc.definition.nodeid)
            kwargs = {key: value for key, value in mark.kwargs.items() if key != "ids"}
            # a test without a row of ours is to be deselected, but it must be collected first
            marks[i] = pytest.mark.parametrize(names, ours or table[:1], **kwargs).mark
        if not self.method.baseline and re.search("|".join(IN_PLACE_OF_LORA), metafunc.definition.nodeid):
            self.selected.add(metafunc.definition.nodeid)
            self.in_place.add(metafunc.definition.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Put our config in the place of `LoraConfig` where a test was written down for LoRA."""
        if item.nodeid.partition("[")[0] not in self.in_place:
            return (yield)
        with mock.patch.object(item.module, "LoraConfig", config_in_place_of_lora(self.method)):  # type: ignore
            return (yield)

    def is_in_name(self, item: pytest.Item) -> bool:
        """Return whether a unittest, which knows no tables, has the name of the method in its own."""
        name = rf"_{label(self.method.config_cls)}(_|$)"
        return isinstance(item, TestCaseFunction) and re.search(name, item.name) is not None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the tests of other methods, and skip, with our reason, what `EXCLUDED` names."""
        mine = [item for item in items if item.nodeid.partition("[")[0] in self.selected or self.is_in_name(item)]
        mine = [item for item in mine if re.search(config.getoption("--only"), item.nodeid)]
        others = [item for item in items if item not in set(mine)]
        items[:] = mine
        config.hook.pytest_deselected(items=others)
        for item in items:
            for methods, tests, reason in EXCLUDED:
                if self.name in methods and re.search(tests, item.nodeid):
                    item.add_marker(pytest.mark.skip(reason=f"hyperadapt_peft: {reason}"))


class Report:
    """Collects what happened, for the table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seen = self.tests.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "seconds": 0.0})
        seen["seconds"] += report.duration
        if report.failed:
            seen.update(outcome="failed", reason=str(report.longrepr).strip().splitlines()[-1])
        elif report.skipped and seen["outcome"] != "failed":
            if hasattr(report, "wasxfail"):
                seen.update(outcome="xfailed", reason=report.wasxfail)
            else:
                seen.update(outcome="skipped", reason=report.longrepr[2].removeprefix("Skipped: "))  # type: ignore

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = {"outcome": "failed", "reason": str(report.longrepr), "seconds": 0.0}

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.tests, indent=1))


class EverythingIsCached(dict[str, int]):
    """Upstream goes online once for each model, unless it thinks that it has been there."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def _quotes() -> Any:
    """Return a stand-in for the data set of quotes that upstream downloads."""
    from datasets import Dataset, DatasetDict

    quotes = [f"The {a} day {b} the road." for a in ("old", "new", "last") for b in ("is", "was", "ends")] * 3
    columns = {"quote": quotes, "author": ["nobody"] * len(quotes), "tags": [["short"]] * len(quotes)}
    return DatasetDict(train=Dataset.from_dict(columns))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Conformance(config.getoption("--method")))
    if (path := config.getoption("--report")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(path))

    sys.path.insert(0, str(config.rootpath))
    pytest.register_assert_rewrite(f"{PACKAGE}.testing_common")
    utils: Any = importlib.import_module(f"{PACKAGE}.testing_utils")
    utils._HUB_MODEL_ACCESSES = EverythingIsCached()
    utils.load_dataset_english_quotes = _quotes
    # PEFT asks the Hub itself whether a model is there; ours are in the cache.
    save_and_load.check_file_exists_on_hf_hub = lambda *args, **_: isinstance(try_to_load_from_cache(*args), str)
