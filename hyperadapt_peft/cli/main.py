"""The command line: `hyperadapt train recipe.yaml`, or `python -m hyperadapt_peft train recipe.yaml`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


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

    command = commands.add_parser("bench", help="measure speed and memory of training with each method, side by side")
    _add_model(command, "--model", default="llama")
    command.add_argument("--rounds", type=int, default=7, help="each times one step of every method (default 7)")
    command.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="default all; a wrong name is told which there are"
    )
    command.add_argument("--output-dir", default="runs/bench", help="of bench.json, bench.md and bench.png")
    command.set_defaults(run=_bench)

    command = commands.add_parser("plan", help="tell what training will need, without loading weights")
    _add_model(command, "model")
    command.add_argument(
        "--tuner",
        default="{peft_type: HYPERADAPT}",
        help="a recipe's tuner section as YAML, for instance '{peft_type: LORA, r: 8}' (default HyperAdapt)",
    )
    command.set_defaults(run=_plan)

    command = commands.add_parser("inspect", help="show the ranks and singular values of an adapter's updates")
    command.add_argument("adapter", help="an adapter's directory or Hub id")
    command.add_argument("--model", help="its base model, default what its config names")
    command.add_argument("--beside", metavar="ADAPTER", help="another adapter of the same base model")
    command.add_argument("--output", help="a directory for ranks.json, ranks.md and ranks.png")
    command.set_defaults(run=_inspect)

    args = parser.parse_args(argv)
    from .errors import RecipeError

    try:
        args.run(args)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_model(command: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """The options of a model that is built from its config, and of its batch."""
    described = "a Hub id, a directory, a config.json, or llama (6 layers of width 768)"
    command.add_argument(name, help=f"{described}; only the config is read", **kwargs)
    command.add_argument("--task", default="causal-lm", help="the model's head, as in a recipe (default causal-lm)")
    command.add_argument("--batch-size", type=int, default=4)
    command.add_argument("--sequence-length", type=int, default=256, help="in tokens (default 256)")
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def _train(args: argparse.Namespace) -> None:
    from .recipe import load
    from .train import dry_run, summary, train

    recipe = load(args.recipe, args.overrides)
    if args.dry_run:
        print(dry_run(recipe), end="")
        return
    results = train(recipe, args.resume, args.overwrite)
    if recipe.arguments.process_index == 0:
        print(summary(results))


def _compare(args: argparse.Namespace) -> None:
    from .compare import compare, load, table

    print(table(compare(load(args.comparison))))


def _bench(args: argparse.Namespace) -> None:
    from .bench import METHODS, bench, table

    options = _model_options(args) | {"rounds": args.rounds, "output_dir": args.output_dir}
    print(table(bench(args.model, methods=args.methods or tuple(METHODS), **options)["rows"]))


def _plan(args: argparse.Namespace) -> None:
    from .plan import plan

    print(plan(args.model, args.tuner, **_model_options(args)))


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ("task", "batch_size", "sequence_length", "dtype")}


def _inspect(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..adapters import inspection
    from .data import local_path
    from .errors import RecipeError, first_line

    reports = {}
    for adapter in filter(None, (args.adapter, args.beside)):
        try:
            model = inspection.load(adapter, args.model and local_path(args.model))
            label = model.active_peft_config.peft_type.value
            reports[label if label not in reports else adapter] = inspection.inspect_adapter(model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RecipeError(f"{adapter}: {first_line(error)}") from error
    if args.output:
        inspection.write(reports, Path(args.output))
    print(inspection.table(reports))
