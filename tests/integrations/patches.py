"""What the modules of other packages hold: `python patches.py OUT [BEFORE]` writes it, of a process with the package or without.

With the package: of all loaded modules of `ROOTS`. Without, after such a run (`BEFORE`): of the same modules and names.
"""

import importlib
import json
import sys
import types
from collections import OrderedDict
from enum import Enum
from typing import Any


ROOTS = ("peft", "transformers", "huggingface_hub", "torch.optim")


def is_theirs(module: str) -> bool:
    return module.startswith(ROOTS) and module.partition(".")[0] in (
        "peft",
        "transformers",
        "huggingface_hub",
        "torch",
    )


def described(value: Any, depth: int = 4) -> Any:
    """Say what a value is, the same in every process."""
    while isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        return [described(f) for f in (value.fget, value.fset, value.fdel)]
    if isinstance(value, types.FunctionType):
        return f"{value.__module__}.{value.__qualname__} {value.__code__.co_filename}:{value.__code__.co_firstlineno}"
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (str, int, float, bytes, Enum, type(None))):
        return repr(value)
    if type(value) in (dict, OrderedDict) and depth:  # others import what is asked for
        return {str(described(k)): described(v, depth - 1) for k, v in list(value.items())}
    if isinstance(value, (list, tuple)) and depth:
        return [described(v, depth - 1) for v in value]
    if isinstance(value, (set, frozenset)) and depth:
        return sorted(str(described(v, depth - 1)) for v in value)
    if hasattr(value, "__args__"):  # a Union
        return described(value.__args__)
    return f"a {type(value).__qualname__}"


def snapshot(names: dict[str, list[str]]) -> dict[str, Any]:
    """Describe the attributes of modules, and of the classes among them that are of these packages."""
    found: dict[str, Any] = {}
    for module_name, attributes in names.items():
        module = importlib.import_module(module_name)
        for attribute in attributes:
            try:
                value = getattr(module, attribute)  # imports it, where the module is lazy
            except (AttributeError, ImportError):
                continue
            if isinstance(value, types.ModuleType):
                continue
            found[f"{module_name}.{attribute}"] = described(value)
            if isinstance(value, type) and is_theirs(value.__module__):
                for key, member in vars(value).items():
                    if key != "__doc__" and not key.startswith("_abc"):
                        found[f"{value.__module__}.{value.__qualname__}.{key}"] = described(member)
    return found


def main() -> None:
    out, *before = sys.argv[1:]
    if before:
        with open(before[0]) as file:
            names = json.load(file)["names"]
    else:
        import hyperadapt_peft  # noqa: F401

        loaded = {name: module for name, module in sys.modules.items() if is_theirs(name)}
        names = {
            name: [key for key in vars(module) if not key.startswith("__")] for name, module in sorted(loaded.items())
        }
    result = {"names": names, "attributes": snapshot(names)}
    assert before == [] or "hyperadapt_peft" not in sys.modules
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
