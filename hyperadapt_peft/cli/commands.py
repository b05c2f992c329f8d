"""What each command does with its arguments, by name. Each imports what it needs: `inspect` takes no data sets."""

from collections.abc import Callable
from typing import Any

from .errors import errors_about


def train(recipe: str, overrides: list[str], dry_run: bool, **options: bool) -> None:
    """Run a recipe, or with `--dry-run` show it."""
    from . import train
    from .recipe import load

    checked = load(recipe, overrides)
    if dry_run:
        print(train.dry_run(checked), end="")
        return
    results = train.train(checked, **options)
    if checked.arguments.process_index == 0:
        print(train.summary(results))


def compare(comparison: str) -> None:
    """Run a comparison and print its tables."""
    from .compare import compare, load, table

    checked = load(comparison)
    print(table(compare(checked)))
    print(f"Next: `hyperadapt inspect` an adapter in {checked.output_dir}; comparison.png there plots the table.")


def bench(**options: Any) -> None:
    """Measure and print the table."""
    from .bench import bench, table

    print(table(bench(**options)["rows"]))
    print(
        "Next: `hyperadapt plan {model}` tells what training needs; {output_dir} has this table as a plot.".format(
            **options
        )
    )


def plan(**options: Any) -> None:
    """Print the plan."""
    from .plan import plan

    print(plan(**options))
    print("\nNext: put the model and the tuner into a recipe (configs/ has some) and run `hyperadapt train RECIPE`.")


def inspect(adapter: str, beside: str | None, model: str | None, output: str | None) -> None:
    """Print the table of one adapter or two, and write it into a directory if there is one."""
    from pathlib import Path

    from ..adapters import inspection

    reports = {}
    for name in filter(None, (adapter, beside)):
        with errors_about(name, name, RuntimeError, KeyError):
            adapted = inspection.load(name, model)
            label = adapted.active_peft_config.peft_type.value
            reports[label if label not in reports else name] = inspection.inspect_adapter(adapted)
    print(inspection.table(reports))
    if output:
        inspection.write(reports, Path(output))
        print(f"Next: {Path(output, 'ranks.png')} plots the singular values and ranks.")
    else:
        print(
            "Next: `--beside ADAPTER` shows another adapter beside it, `--output DIRECTORY` writes the plot and data."
        )


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "bench": bench,
    "plan": plan,
    "inspect": inspect,
}
