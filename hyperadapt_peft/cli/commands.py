"""What each command does with its parsed arguments. Each imports what it needs: `inspect` takes no data sets."""

import argparse
from typing import Any

from .errors import errors_about


def train(args: argparse.Namespace) -> None:
    """Run a recipe, or with `--dry-run` show it."""
    from .recipe import load
    from .train import dry_run, summary, train

    recipe = load(args.recipe, args.overrides)
    if args.dry_run:
        print(dry_run(recipe), end="")
        return
    results = train(recipe, args.resume, args.overwrite, args.verify)
    if recipe.arguments.process_index == 0:
        print(summary(results))


def compare(args: argparse.Namespace) -> None:
    """Run a comparison and print its tables."""
    from .compare import compare, load, table

    comparison = load(args.comparison)
    print(table(compare(comparison)))
    print(f"Next: `hyperadapt inspect` an adapter in {comparison.output_dir}; comparison.png there plots the table.")


def bench(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    from .bench import METHODS, bench, table

    own = ("rounds", "output_dir", "device", "autocast", "gradient_checkpointing")
    options = _model_options(args) | {key: getattr(args, key) for key in own}
    print(table(bench(args.model, methods=args.methods or tuple(METHODS), **options)["rows"]))
    print(
        f"Next: `hyperadapt plan {args.model}` tells what training needs; {args.output_dir} has this table as a plot."
    )


def plan(args: argparse.Namespace) -> None:
    """Print the plan."""
    from .plan import plan

    print(plan(args.model, args.tuner, **_model_options(args)))
    print("\nNext: put the model and the tuner into a recipe (configs/ has some) and run `hyperadapt train RECIPE`.")


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ("task", "batch_size", "sequence_length", "dtype")}


def inspect(args: argparse.Namespace) -> None:
    """Print the table of one adapter or two, and write it into a directory if there is one."""
    from pathlib import Path

    from ..adapters import inspection

    reports = {}
    for adapter in filter(None, (args.adapter, args.beside)):
        with errors_about(adapter, adapter, RuntimeError, KeyError):
            model = inspection.load(adapter, args.model)
            label = model.active_peft_config.peft_type.value
            reports[label if label not in reports else adapter] = inspection.inspect_adapter(model)
    print(inspection.table(reports))
    if args.output:
        inspection.write(reports, Path(args.output))
        print(f"Next: {Path(args.output, 'ranks.png')} plots the singular values and ranks.")
    else:
        print(
            "Next: `--beside ADAPTER` shows another adapter beside it, `--output DIRECTORY` writes the plot and data."
        )


COMMANDS = {"train": train, "compare": compare, "bench": bench, "plan": plan, "inspect": inspect}
