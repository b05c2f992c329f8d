"""The `hyperadapt` command: `hyperadapt train recipe.yaml`, or `python -m hyperadapt_cli train recipe.yaml`.

It lies beside the package, which imports torch and registers its methods when it is imported: that is left until a
command runs, so that `--help`, `--version` and a wrong option answer at once.
"""

import argparse
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="hyperadapt", description="Fine-tune with HyperAdapt and every PEFT method.")
    parser.add_argument("--version", action="version", version=f"hyperadapt_peft {version('hyperadapt_peft')}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train, save and evaluate what a YAML recipe describes")
    command.set_defaults(function=train)
    command.add_argument("recipe", help="a YAML file with the sections task, model, data, tuner and training")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="change the recipe, for instance training.learning_rate=1e-3 or tuner='{peft_type: LORA, r: 8}'",
    )
    start = command.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output directory")
    start.add_argument("--overwrite", action="store_true", help="remove the earlier run in the output directory first")
    start.add_argument("--dry-run", action="store_true", help="check and show the recipe; download and train nothing")
    command.add_argument(
        "--verify", action="store_true", help="evaluate before training too, and what is reloaded from disk"
    )

    command = commands.add_parser("compare", help="train several methods on one task and put them in a table")
    command.set_defaults(function=compare)
    command.add_argument("comparison", help="a YAML file with the keys recipe, seeds, methods and output_dir")

    command = commands.add_parser("bench", help="measure speed and memory of training with each method, side by side")
    command.set_defaults(function=bench)
    _add_model(command, "--model", default="llama")
    command.add_argument("--rounds", type=int, default=7, help="each times one step of every method (default 7)")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--autocast", action="store_true", help="run forward passes under autocast to bfloat16")
    command.add_argument("--gradient-checkpointing", action="store_true", help="keep the blocks' inputs only")
    command.add_argument("--compile", action="store_true", help="run forward and backward passes under torch.compile")
    command.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="default all; a wrong name is told which there are"
    )
    command.add_argument("--output-dir", default="runs/bench", help="of bench.json, bench.md and bench.png, replaced")

    command = commands.add_parser("plan", help="tell what training will need, without loading weights")
    command.set_defaults(function=plan)
    _add_model(command, "model")
    command.add_argument(
        "--tuner",
        default="{peft_type: HYPERADAPT}",
        help="a recipe's tuner section as YAML, for instance '{peft_type: LORA, r: 8}' (default HyperAdapt)",
    )

    command = commands.add_parser("inspect", help="show the ranks and singular values of an adapter's updates")
    command.set_defaults(function=inspect)
    command.add_argument("adapter", help="an adapter's directory or Hub id")
    command.add_argument("--model", help="its base model, default what its config names")
    command.add_argument("--beside", metavar="ADAPTER", help="another adapter of the same base model")
    command.add_argument("--output", help="a directory for ranks.json, ranks.md and ranks.png")

    command = commands.add_parser(
        "run", help="run a command, such as lm_eval, whose Python processes then know the methods of this package"
    )
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    return parser


def _add_model(command: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """The options of a model that is built from its config, and of its batch."""
    described = "a Hub id, a directory, a config.json, or llama (6 layers of width 768)"
    command.add_argument(name, help=f"{described}; only the config is read", **kwargs)
    command.add_argument("--task", default="causal-lm", help="the model's head, as in a recipe (default causal-lm)")
    command.add_argument("--batch-size", type=int, default=4, help="in sequences or images (default 4)")
    command.add_argument("--sequence-length", type=int, default=256, help="in tokens (default 256)")
    command.add_argument(
        "--dtype", default="float32", help="of the base model's weights", choices=["float32", "bfloat16", "float16"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a mistake in the recipe, told in one line)."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "train" and not any(argument.startswith("-") for argument in rest):
        args.overrides += rest  # those after an option, which argparse does not take for overrides
    elif rest:
        hint = f"`hyperadapt {args.command} --help` shows which there are"
        parser.error(f"unrecognized arguments: {' '.join(rest)}; {hint}")
    if args.command == "run":
        if not args.arguments:
            parser.error("run: expected a command")
        return run(args.arguments)
    quiet_libraries()
    from hyperadapt_peft.cli.errors import RecipeError

    options = vars(args)
    del options["command"]
    try:
        options.pop("function")(**options)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(recipe: str, overrides: list[str], dry_run: bool, **options: bool) -> None:
    """Run a recipe, or with `--dry-run` show it."""
    from hyperadapt_peft.cli import train
    from hyperadapt_peft.cli.recipe import load

    checked = load(recipe, overrides)
    if dry_run:
        print(train.dry_run(checked), end="")
        return
    results = train.train(checked, **options)
    if checked.arguments.process_index == 0:
        print(train.summary(results))


def compare(comparison: str) -> None:
    """Run a comparison and print its tables."""
    from hyperadapt_peft.cli.compare import compare, load, table

    checked = load(comparison)
    print(table(compare(checked)))
    print(
        f"Next: `hyperadapt inspect` an adapter in {checked.output_dir}{_plot(checked.output_dir, 'comparison.png')}."
    )


def bench(model: str, output_dir: str, **options: Any) -> None:
    """Measure and print the table."""
    from hyperadapt_peft.cli.bench import bench, table

    print(table(bench(model, output_dir=output_dir, **options)["rows"]))
    print(f"Next: `hyperadapt plan {model}` tells what training needs{_plot(output_dir, 'bench.png')}.")


def plan(**options: Any) -> None:
    """Print the plan."""
    from hyperadapt_peft.cli.plan import plan

    print(plan(**options))
    print("\nNext: put the model and the tuner into a recipe (configs/ has some) and run `hyperadapt train RECIPE`.")


def inspect(adapter: str, beside: str | None, model: str | None, output: str | None) -> None:
    """Print the table of one adapter or two, and write it into a directory if there is one."""
    from hyperadapt_peft.adapters import inspection
    from hyperadapt_peft.cli.errors import errors_about

    reports = {}
    for name in filter(None, (adapter, beside)):
        with errors_about(name, name, RuntimeError, KeyError):
            adapted = inspection.load(name, model)
            label = adapted.active_peft_config.peft_type.value
            reports[label if label not in reports else name] = inspection.inspect_adapter(adapted)
    print(inspection.table(reports))
    if output:
        inspection.write(reports, Path(output))
        print(f"Next: {Path(output, 'ranks.json')} has the singular values{_plot(output, 'ranks.png')}.")
    else:
        print(
            "Next: `--beside ADAPTER` shows another adapter beside it, `--output DIRECTORY` writes the plot and data."
        )


def _plot(directory: str | Path, name: str) -> str:
    """The end of a sentence that tells of the plot, or of what is missing for it."""
    path = Path(directory, name)
    return f"; {path} is the plot" if path.is_file() else "; `pip install matplotlib` for a plot too"


def quiet_libraries() -> None:
    """Leave out what other libraries report about themselves; what the environment says of their verbosity holds."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its report of a head that is new, as it must be
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # kernels for other machines, deprecations
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def run(command: list[str]) -> int:
    """Run a command whose Python processes, and theirs, register the methods as soon as they import `peft`.

    The directory that does it comes first on `PYTHONPATH`, for this command only. Returns the command's exit code, on
    POSIX by becoming the command, so that signals reach it too.
    """
    startup = Path(__file__).with_name("hyperadapt_peft") / "cli" / "startup"
    paths = [str(startup), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        if os.name == "nt":
            return subprocess.run(command, env=environment, check=False).returncode
        os.execvpe(command[0], command, environment)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
