"""The command line: `hyperadapt train recipe.yaml`, or `python -m hyperadapt_peft train recipe.yaml`."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a mistake in the recipe, told in one line)."""
    parser = argparse.ArgumentParser(prog="hyperadapt", description="Fine-tune with HyperAdapt and every PEFT method.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train, save, reload and evaluate what a YAML recipe describes")
    command.add_argument("recipe", help="a YAML file with the sections task, model, data, tuner and training")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="change the recipe, for instance training.learning_rate=1e-3 or tuner='{peft_type: LORA, r: 8}'",
    )
    again = command.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output directory")
    again.add_argument("--overwrite", action="store_true", help="remove the earlier run in the output directory first")
    again.add_argument("--dry-run", action="store_true", help="check and show the recipe; download and train nothing")
    command.set_defaults(run=_train)

    command = commands.add_parser("compare", help="train several methods on one task and put them in a table")
    command.add_argument("comparison", help="a YAML file with the keys recipe, seeds, methods and output_dir")
    command.set_defaults(run=_compare)

    command = commands.add_parser("inspect", help="show the ranks and singular values of an adapter's updates")
    command.add_argument("adapter", help="an adapter's directory or Hub id")
    command.add_argument("--model", help="its base model, default what its config names")
    command.add_argument("--beside", metavar="ADAPTER", help="another adapter of the same base model")
    command.add_argument("--output", help="a directory for ranks.json, ranks.md and ranks.png")
    command.set_defaults(run=_inspect)

    args = parser.parse_args(argv)
    from .training.errors import RecipeError

    try:
        args.run(args)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(args: argparse.Namespace) -> None:
    from .training.recipe import load
    from .training.train import dry_run, summary, train

    if args.dry_run:
        print(dry_run(load(args.recipe, args.overrides)), end="")
        return
    print(summary(train(load(args.recipe, args.overrides), args.resume, args.overwrite)))


def _compare(args: argparse.Namespace) -> None:
    from .training.compare import compare, load, table

    print(table(compare(load(args.comparison))))


def _inspect(args: argparse.Namespace) -> None:
    from pathlib import Path

    from . import inspection
    from .training.data import local_path
    from .training.errors import RecipeError, first_line

    reports = {}
    for adapter in filter(None, (args.adapter, args.beside)):
        try:
            model = inspection.load(adapter, args.model and local_path(args.model))
            label = model.active_peft_config.peft_type.value
            reports[label if label not in reports else adapter] = inspection.inspect(model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RecipeError(f"{adapter}: {first_line(error)}") from error
    if args.output:
        inspection.write(reports, Path(args.output))
    print(inspection.table(reports))


if __name__ == "__main__":
    sys.exit(main())
