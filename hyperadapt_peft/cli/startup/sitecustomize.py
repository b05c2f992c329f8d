"""What each Python process of `hyperadapt run COMMAND` runs at its start, this directory being first on its path.

Once `peft` is imported, `hyperadapt_peft` is imported too. The sitecustomize that this one hides is run as well.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any


class RegisterAfterPeft:
    """A finder that leaves `peft` to the others and adds an import to the end of its execution."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next(filter(None, found), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                import hyperadapt_peft  # noqa: F401

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, RegisterAfterPeft())
here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
hidden: Any = PathFinder.find_spec("sitecustomize")
if hidden is not None:
    sys.modules["sitecustomize"] = module_from_spec(hidden)
    hidden.loader.exec_module(sys.modules["sitecustomize"])
