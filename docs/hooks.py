"""What the pages take from the committed results: `{{ name(arguments) }}` in a page becomes a table or a number."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from scipy.stats import t, ttest_1samp


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs runs elsewhere
from benchmarks import runs


RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("numerical", "effective", "stable")
CALL = re.compile(r"\{\{ (\w+)\((.*?)\) \}\}")


def on_files(files: Any, config: Any) -> Any:
    """Add the committed plots to the site, as `results/plots/<directory>-<name>.png`."""
    from mkdocs.structure.files import File

    for plot in sorted(RESULTS.rglob("*.png")):
        name = "-".join(plot.relative_to(RESULTS).parts)
        files.append(File.generated(config, f"results/plots/{name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fill in a page's tables and numbers."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """Replace each `{{ name(arguments) }}` by what the function of that name returns."""
    return CALL.sub(
        lambda call: str(FUNCTIONS[call[1]](*ast.literal_eval(f"({call[2]},)" if call[2] else "()"))), markdown
    )


def read(name: str) -> Any:
    """The content of a JSON file of the results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table whose columns after the first `left` are aligned to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, rule, *rows])


def comparison(name: str) -> str:
    """Methods of one task: mean and standard error over seeds, in percent."""
    rows = read(f"{name}/comparison")
    return table(
        ["method", "trained outside the head", "learning rate", "seeds", "validation, %", "test, %"],
        [
            [r["method"], f"{r['trainable_outside_head']:,}", f"{r['learning_rate']:g}", len(r["test"])]
            + [mean_and_error(r[split]) for split in ("validation", "test")]
            for r in rows
        ],
    )


def mean_and_error(scores: list[float]) -> str:
    """`82.5 ± 0.1`: mean and standard error of shares, in percent."""
    mean = f"{100 * statistics.mean(scores):.1f}"
    return f"{mean} ± {100 * statistics.stdev(scores) / len(scores) ** 0.5:.1f}" if len(scores) > 1 else mean


def sweep(name: str) -> str:
    """What each learning rate gave on validation with the first seed."""
    lines = []
    for row in read(f"{name}/comparison"):
        scores = sorted(row["sweep"].items(), key=lambda pair: float(pair[0]))
        lines.append([row["method"], ", ".join(f"{float(rate):g}: {100 * score:.1f}" for rate, score in scores)])
    return table(["method", "learning rate: validation, %"], lines, left=2)


def paired(name: str, *references: str) -> str:
    """Differences on test to other methods, seed by seed, with a 95 % interval, in points."""
    scores = {row["method"]: row["test"] for row in read(f"{name}/comparison")}
    lines = []
    for method, ours in scores.items():
        cells = []
        for reference in references:
            found = interval([100 * (a - b) for a, b in zip(ours, scores[reference], strict=False)])
            cells.append("{:+.1f} ± {:.1f}".format(*found) if found and method != reference else "")
        lines.append([method, *cells])
    return table(["method", *(f"beside {reference}, points" for reference in references)], lines)


def interval(differences: list[float]) -> tuple[float, float] | None:
    """Their mean, and half its 95 % interval; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    return statistics.mean(differences), float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def holm(p_values: dict[Any, float]) -> set[Any]:
    """What is significant at 5 % among all of these."""
    found = set()
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > 0.05 / (len(p_values) - i):
            break
        found.add(name)
    return found


@cache
def chosen(task: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Method -> seed -> run of a task of `benchmarks.quality`, at the method's best rate."""
    return runs.chosen(read(f"quality/{task}")["runs"])


def difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> tuple[float, float] | None:
    """`interval` of the differences on test, of the seeds that both have."""
    return interval(runs.differences(ours, theirs))


def intervals(method: str, reference: str) -> dict[str, tuple[float, float]]:
    """Task -> `difference` of two methods, of the tasks on which both have seeds in common."""
    found = {}
    for task in quality_tasks():
        methods = chosen(task)
        if pair := difference(methods.get(method, {}), methods.get(reference, {})):
            found[task] = pair
    return found


def side(mean: float, half: float) -> str:
    """On which side of 0 the interval is."""
    return "level" if abs(mean) <= half else "ahead" if mean > 0 else "behind"


def quality(task: str, *some_methods: str) -> str:
    """All or some methods of a task: scores in percent, and the differences to LoRA of equal and of eight times the size.

    LoRA as it was trained too, as with three epochs, if it was.
    """
    methods = chosen(task)
    lines = []
    for method in some_methods or methods:
        seeds = methods[method]
        some = next(iter(seeds.values()))
        line = [method, f"{some['trainable_outside_head']:,}", f"{some['learning_rate']:g}", len(seeds)]
        line += [mean_and_error([run[split] for run in seeds.values()]) for split in ("validation", "test")]
        trained_so = method.removeprefix(method.split(", ")[0])
        for lora in ("LoRA r=1", "LoRA r=8"):
            reference = lora + trained_so if lora + trained_so in methods else lora
            found = difference(seeds, methods[reference]) if method != reference and reference in methods else None
            line.append("{:+.1f} ± {:.1f}".format(*found) if found else "")
        lines.append(line)
    header = ["method", "trained outside the head", "learning rate", "seeds", "validation, %", "test, %"]
    return table([*header, "beside LoRA r=1", "beside LoRA r=8"], lines)


def standing(method: str, reference: str) -> str:
    """On which tasks a method is ahead of another, level with it and behind it, in words."""
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "level": []}
    for task, pair in intervals(method, reference).items():
        found[side(*pair)].append(task)
    level = len(found.pop("level"))
    said = [f"{where} on {', '.join(tasks)}" for where, tasks in found.items() if tasks]
    return ", ".join([*said, f"level on {'the other ' if said else 'all '}{level}"])


def quality_summary(method: str) -> str:
    """Where a method is ahead of LoRA, level with it (an interval that holds 0) and behind, task by task.

    With a star where that stays so after Holm's correction for the comparisons of this table.
    """
    tasks = {task: chosen(task) for task in quality_tasks()}
    pairs = [(task, reference) for task in tasks for reference in ("LoRA r=1", "LoRA r=8")]
    found = {(task, name): runs.differences(tasks[task][method], tasks[task][name]) for task, name in pairs}
    certain = holm({pair: ttest_1samp(points, 0).pvalue for pair, points in found.items()})
    lines: dict[str, list[str]] = {task: [task] for task in tasks}
    for pair, points in found.items():
        mean, half = interval(points) or (0, 0)
        star = "*" if pair in certain else ""
        lines[pair[0]].append(f"{side(mean, half)}{star}: {mean:+.1f} ± {half:.1f}")
    return table(["task", "beside LoRA r=1, points", "beside LoRA r=8, points"], [*lines.values()], left=3)


def quality_standings(reference: str) -> str:
    """Where other methods are ahead of a reference and behind it, of those that ran on most tasks, film reviews among them.

    The mean is over the tasks that a method ran on, and, as where some seeds learn nothing decides it, without syllogisms.
    """
    lines: list[tuple[float, list[Any]]] = []
    for method, seeds in chosen("film-reviews").items():
        found = intervals(method, reference)
        if method == reference or len(found) < len(quality_tasks()) / 2:
            continue
        means = [
            statistics.mean(mean for task, (mean, _) in found.items() if task != out) for out in ("", "syllogisms")
        ]
        sides = [
            ", ".join(task for task, pair in found.items() if side(*pair) == which) for which in ("ahead", "behind")
        ]
        trained = runs.trained(seeds)
        lines.append((means[0], [method, f"{trained:,}", len(found), *(f"{mean:+.1f}" for mean in means), *sides]))
    header = ["method", "trained, MiniLM", "tasks", f"beside {reference}, points", "without syllogisms"]
    return table([*header, "ahead on", "behind on"], [line for _, line in sorted(lines, key=lambda item: -item[0])])


def quality_tasks(kind: str = "") -> list[str]:
    """The tasks that HyperAdapt and LoRA ran on, or did in a kind of training: `one_rate/`."""
    tasks = sorted(path.stem for path in (RESULTS / "quality").glob(f"{kind}*.json"))
    return [task for task in tasks if {"HyperAdapt", "LoRA r=1"} <= chosen(kind + task).keys()]


def quality_tables(kind: str = "") -> str:
    """The table of every task that has results, with its command."""
    parts = []
    for task in quality_tasks(kind):
        methods = [name for name in chosen(kind + task) if ", head at " not in name]
        command = read(f"quality/{kind}{task}")["command"]
        parts.append(f"#### {task}\n\n```bash\n{command}\n```\n\n{quality(kind + task, *methods)}")
    return "\n\n".join(parts)


def head_rates() -> str:
    """Validation scores by the head's rate, under the first seed, at the one adapter's rate that ran with all of them."""
    heads = ("2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2", "6.4e-2", "1.28e-1")
    lines = []
    for task in quality_tasks():
        results = read(f"quality/{task}")
        methods, own = runs.by_rate(results["runs"]), results["recipe"]["training"].get("head_learning_rate")
        for method in ("HyperAdapt", "SURM Kronecker", "LoRA r=1", "LoRA r=8"):
            names = [method if float(head) == own else f"{method}, head at {float(head):g}" for head in heads]
            tried = [set(methods[name]) for name in names if name in methods]
            if len(tried) < 4:
                continue
            rate = min(set.intersection(*tried))
            scores = [methods[name][rate].get(0) if name in methods else None for name in names]
            cells = [f"{100 * run['validation']:.1f}" if run else "" for run in scores]
            lines.append([task, method, f"{rate:g}", *cells])
    return table(["task", "method", "learning rate", *(f"head at {head}" for head in heads)], lines, left=2)


def quality_rates(task: str, method: str) -> str:
    """A method's scores at each learning rate."""
    lines = []
    for rate, seeds in runs.by_rate(read(f"quality/{task}")["runs"])[method].items():
        scores = (mean_and_error([run[split] for run in seeds.values()]) for split in ("validation", "test"))
        lines.append([f"{rate:g}", len(seeds), *scores])
    return table(["learning rate", "seeds", "validation, %", "test, %"], lines)


def quality_overview(*some_methods: str) -> str:
    """Test scores in percent of some methods, task by task."""
    lines = []
    for task in quality_tasks():
        methods = chosen(task)
        line = [mean_and_error([run["test"] for run in methods[name].values()]) for name in some_methods]
        lines.append([task, *line])
    return table(["task", *some_methods], lines)


def quality_both() -> str:
    """Scales and Kronecker products together: test, and the differences to the better part, by validation, and to LoRA."""
    names = ("HyperAdapt", "SURM Kronecker", "HyperAdapt and Kronecker", "LoRA r=2", "LoRA r=8")
    lines = []
    for task in quality_tasks():
        one, other, both, *lora = (chosen(task).get(name, {}) for name in names)
        if not both:
            continue
        better = max(one, other, key=lambda part: runs.mean(part, "validation"))
        line = [
            task,
            *(mean_and_error([run["test"] for run in seeds.values()]) for seeds in (one, other, both)),
        ]
        for reference in (better, *lora):
            found = difference(both, reference)
            line.append("{:+.1f} ± {:.1f}".format(*found) if found else "")
        lines.append(line)
    return table(
        ["task", *names[:2], "both", "beside the better part", *(f"beside {name}" for name in names[3:])], lines
    )


def surm_tried() -> str:
    """Every structure, placement, start and choice of layers that was tried, beside LoRA of equal size, on CIFAR-10."""
    names = chosen("one_rate/cifar10")
    return quality("one_rate/cifar10", *(name for name in names if name.startswith(("SURM", "LoRA r=1"))))


def quality_recipe(method: str, kind: str = "") -> str:
    """A method at its own best rate and at those that are best for LoRA, task by task: test, of how many seeds."""
    lines = []
    for task in quality_tasks(kind):
        methods = runs.by_rate(read(f"quality/{kind}{task}")["runs"])
        rates = methods[method]
        line = [task, _at(rates, runs.best_rate(rates))]
        lines.append(line + [_at(rates, runs.best_rate(methods[lora])) for lora in ("LoRA r=1", "LoRA r=8")])
    return table(["task", "at its own best rate", "at the best of LoRA r=1", "at the best of LoRA r=8"], lines, left=4)


def _at(rates: dict[float, dict[int, dict[str, Any]]], rate: float) -> str:
    seeds = rates.get(rate, {})
    score = f"{mean_and_error([run['test'] for run in seeds.values()])} ({len(seeds)})" if seeds else "not run"
    return f"{rate:g}: {score}"


def best_by_size() -> str:
    """The method with the best mean validation score of those that train at most a share of LoRA r=8's numbers."""
    shares = {"1/8": 1 / 8, "1/3": 1 / 3, "1": 1.0}
    lines = []
    for task in quality_tasks():
        methods = {name: seeds for name, seeds in chosen(task).items() if len(seeds) > 1 and ", " not in name}
        whole, line = runs.trained(methods["LoRA r=8"]), [task]
        for share in shares.values():
            fitting = [name for name, seeds in methods.items() if runs.trained(seeds) <= share * whole]
            best = max(fitting, key=lambda name: runs.mean(methods[name], "validation"))
            line.append(f"{best}: {mean_and_error([run['test'] for run in methods[best].values()])}")
        lines.append(line)
    return table(["task", *(f"at most {share} of LoRA r=8" for share in shares)], lines, left=4)


def known_update() -> str:
    """The error that is left of a known update, by method."""
    rows = read("known_update")["rows"]
    kinds = list(dict.fromkeys(row["update"] for row in rows))
    errors = {(row["method"], row["update"]): row["error"] for row in rows}
    trained = {row["method"]: row["trained"] for row in rows}
    return table(
        ["method", "trained", *kinds],
        [[m, f"{size:,}", *(f"{errors[m, kind]:.2f}" for kind in kinds)] for m, size in trained.items()],
    )


def bench(name: str = "bench/bench") -> str:
    """Speed and memory of a training step."""
    mebi = 2**20
    rows = read(name)["rows"]
    counted = "training_kernels" in rows[0]
    header = ["method", "step, x frozen", "kept for backward, MiB", "peak, MiB", "trained", "saved, bytes"]
    lines = []
    for row in rows:
        if "out_of_memory" in row:
            lines.append([row["method"], "out of memory", *[""] * (7 if counted else 4)])
            continue
        line = [row["method"], f"{row['step_ratio']:.2f}", f"{row['saved_bytes'] / mebi:.0f}"]
        line += [f"{row['peak_bytes'] / mebi:.0f}", f"{row['trainable']:,}"]
        line.append(f"{row['adapter_bytes']:,}" if row["adapter_bytes"] else "")
        if counted:
            line += [row.get(key, "") for key in ("kernels", "training_kernels", "syncs")]
        lines.append(line)
    return table(header + ["kernels, inference", "kernels, training", "host syncs"] * counted, lines)


def conformance() -> str:
    """PEFT's own tests by method."""
    results = read("conformance")
    names = {"hyperadapt": "HyperAdapt", "surm": "SURM", "lora": "LoRA", "ia3": "IA3"}
    lines = [
        [key, *(f"{results[m]['all'].get(key, 0):,}" for m in results)] for key in ("passed", "failed", "skipped")
    ]
    return table(["", *(names.get(method, method) for method in results)], lines)


def skips(method: str) -> str:
    """Why tests of a method were skipped, and how many for each reason."""
    reasons = sorted(read("conformance")[method]["skipped"].items(), key=lambda pair: -pair[1])
    return table(["reason", "tests"], [[reason.replace("|", "\\|"), f"{count:,}"] for reason, count in reasons])


def fuzz(outcome: str) -> str:
    """How many mutated adapter files were `loaded`, or `refused`."""
    outcomes = read("fuzz")["outcomes"]
    return f"{sum(count for key, count in outcomes.items() if f': {outcome}' in key):,}"


def value(name: str, *path: str | int) -> str:
    """One number of a JSON file of the results, found by its keys."""
    found = read(name)
    for key in path:
        found = found[key]
    return f"{found:,}" if isinstance(found, int) else f"{found:.3g}" if isinstance(found, float) else str(found)


def versions() -> str:
    """The environments in which a part of the tests ran."""
    keys = ("python", "torch", "transformers", "peft", "passed")
    lines = [[row.get(key, "") for key in keys] for row in read("compatibility")["rows"]]
    return table(["Python", "torch", "transformers", "PEFT", "tests passed"], lines, left=4)


def forgetting() -> str:
    """Next-token accuracy on sentences after training on sums, beside the sums' own score."""
    lines = []
    for method, rates in read("forgetting").items():
        if method == "untrained":
            lines.append([method, "", f"{100 * statistics.mean(rates['sentences']):.1f}", ""])
            continue
        for rate, scores in rates.items():
            means = [f"{100 * statistics.mean(scores[key]):.1f}" for key in ("sentences", "sums")]
            lines.append([method, f"{float(rate):g}", *means])
    return table(["method", "learning rate", "sentences, %", "sums, %"], lines)


def ranks() -> str:
    """Numerical, effective and stable rank of trained updates, as shares of full rank."""
    lines = []
    for label, report in read("ranks/ranks").items():
        shares = [[e[f"{kind}_rank"] / e["full_rank"] for e in report.values()] for kind in KINDS]
        lines.append([label, *(f"{min(s):.1%} ({statistics.mean(s):.1%})" for s in shares)])
    return table(["method", *(f"{kind} rank, of full: least (mean)" for kind in KINDS)], lines)


def approximation() -> str:
    """Which of the paper's orderings hold."""
    orderings = read("surm_approximation")["orderings"]
    rows = [[o["claim"], "yes" if o["holds"] else "no", o["numbers"]] for o in orderings]
    return table(["claim of the paper", "holds", "errors"], rows, left=3)


def gpu_kept(model: str, method: str = "hyperadapt") -> str:
    """What a method keeps for the backward pass, as a part of what LoRA r=8 keeps."""
    kept = {row["method"]: row.get("saved_bytes") for row in read(f"gpu/{model}-bf16/bench")["rows"]}
    return f"{kept[method] / kept['lora-r8']:.2f}"


def gpu_rounds(run: str, method: str) -> str:
    """The least and the most of a method's step beside the frozen one's, of all rounds."""
    (ratios,) = (row["step_ratios"] for row in read(f"gpu/{run}/bench")["rows"] if row["method"] == method)
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def gpu_memory() -> str:
    """What a step needs in all beside the plan's prediction, by model and method, in GiB."""
    models = read("gpu/memory")

    def cell(size: int | None) -> str:
        return "out of memory" if size is None else f"{size / 2**30:.1f}"

    header = ["method", *(f"{model}: {what}" for model in models for what in ("plan", "measured"))]
    rows = [
        [method, *(cell(models[model][method][what]) for model in models for what in ("planned", "measured"))]
        for method in next(iter(models.values()))
    ]
    return table(header, rows)


def mixed_batch(name: str = "mixed_batch") -> str:
    """Every run of the benchmark of mixed batches, a column each."""
    runs = read(name)["runs"]
    keys = dict.fromkeys(key for run in runs for key in run if key not in ("method", "loaded"))

    def cell(found: Any) -> str:
        return f"{found:,}" if isinstance(found, int) else f"{found:.3g}" if isinstance(found, float) else str(found)

    header = ["", *(f"{run['method']}, {run['loaded']:,} loaded" for run in runs)]
    return table(header, [[key, *(cell(run.get(key, "")) for run in runs)] for key in keys])


def vllm(name: str) -> str:
    """Throughput of the engine by method and number of adapters."""
    rows = read(name)["variants"]
    keys = ("tokens per second", "of the engine without adapters", "ms to the first token")
    return table(
        ["method", "adapters", *keys],
        [[row["method"], row["adapters"], *(f"{row[k]:.3g}" for k in keys)] for row in rows],
    )


def vllm_slots(name: str) -> str:
    """Start and memory of the engine by its number of slots."""
    rows = [row for row in read(name)["engines"] if row["method"] != "no adapters enabled"]
    lines = [[row["slots"], f"{row['seconds to start']:.3g}", f"{row['bytes of memory'] / 1e6:,.0f}"] for row in rows]
    return table(["slots", "start, s", "memory, MB"], lines[:-1])  # the last is what the requests ran on


def include(name: str) -> str:
    """A page of the repository's top level; its links to files become code."""
    text = (ROOT / name).read_text()
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"`\1`", text)


def patches() -> str:
    """The table of what importing changes, from the docstring of the room that does it."""
    tree = ast.parse((ROOT / "hyperadapt_peft" / "integrations" / "__init__.py").read_text())
    return "\n".join(line for line in (ast.get_docstring(tree) or "").splitlines() if line.startswith("|"))


def command_line() -> str:
    """The help of every command."""
    shown = []
    for command in ("", "train", "compare", "bench", "plan", "inspect", "run"):
        line = [sys.executable, "-m", "hyperadapt_cli", *([command] if command else []), "--help"]
        done = subprocess.run(
            line, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"COLUMNS": "100"}
        )
        shown.append(f"## hyperadapt {command}\n\n```text\n{done.stdout.strip()}\n```")
    return "\n\n".join(shown)


FUNCTIONS = {
    function.__name__: function
    for function in (
        approximation, bench, best_by_size, command_line, comparison, conformance, forgetting, fuzz, gpu_kept, gpu_memory, gpu_rounds, head_rates,
        include, known_update, mixed_batch, paired, patches, quality, quality_both, quality_overview, quality_rates, quality_recipe,
        quality_standings, quality_summary, quality_tables, ranks, skips, standing, surm_tried, sweep, value, versions, vllm, vllm_slots,
    )
}  # fmt: skip
