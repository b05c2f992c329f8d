"""FFT or dense: time both ways of multiplying by each SURM structure, forward and backward, and say where they cross.

    python benchmarks/surm_products.py            # everything, about two minutes
    python benchmarks/surm_products.py --quick    # a few shapes, to see that it runs

Three tables:
1. products: by FFT and by building the matrix, by structure, width and tokens. `dense_up_to` of the structures in
   hyperadapt_peft/tuners/surm/structures/ is read off this table.
2. parallel: a frozen linear layer alone, with LoRA of rank 8, and with a circulant update in several ways.
3. building: what the n x n circulant matrix and its gradient cost, which a dense product pays at every step.

Times are CPU time on one thread, so that other work on the machine does not count; all variants of a row run in turn
within one process, and the best repetition of each is kept. Results go to benchmarks/results/surm_products.json with the command and the versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hyperadapt_peft.tuners.surm.structures import LDR, STRUCTURES, Circulant, Kronecker, Toeplitz, get_structure


RESULTS = Path(__file__).parent / "results" / "surm_products.json"
WIDTHS = (32, 64, 96, 128, 192, 256, 384, 768, 2048, 8192)
TOKENS = (1, 64, 1024, 4096)
LARGEST = 2**22  # numbers in x
DENSE_WIDTH = {"circulant": 2048, "toeplitz": 768, "ldr": 384, "kronecker": 768}  # above it dense is far behind


def milliseconds(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The best time of each, timed in turn until `seconds` are spent (three times at least)."""
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    stop = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < 3 or time.perf_counter() < stop:
        for name, run in variants.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: round(1e3 * min(series), 4) for name, series in times.items()}


def training(product: Callable[..., Tensor], x: Tensor, *factors: Tensor) -> Callable[[], object]:
    """Forward and backward to the input and the trained factors."""
    inputs = [x, *(factor for factor in factors if factor.requires_grad)]
    grad = torch.randn_like(product(x, *factors).detach())
    return lambda: torch.autograd.grad(product(x, *factors), inputs, grad)


def products(widths: tuple[int, ...], tokens: tuple[int, ...], seconds: float) -> list[dict]:
    cases = {
        "circulant": Circulant(),
        "toeplitz": Toeplitz(),
        "ldr(1)": LDR(1),
        "ldr(4)": LDR(4),
        "kronecker": Kronecker(),
    }
    rows = []
    grid = [(name, n, t) for name in cases for n in widths for t in tokens if n * t <= LARGEST]
    for name, n, t in tqdm(grid, desc="products"):
        structure = cases[name]
        factors = [torch.randn(shape, requires_grad=True) for shape in structure.factor_shapes(n, n)]
        x = torch.randn(t, n, requires_grad=True)
        by_matrix = structure.dense_matmul
        if name == "kronecker":  # its `dense_matmul` does not build the matrix

            def by_matrix(x, a, b, n=n):
                return x @ Kronecker().dense(a, b, n, n).mT

        variants = {"reshaped": structure.dense_matmul} if name == "kronecker" else {"fft": structure.fft_matmul}
        if n <= DENSE_WIDTH[name.partition("(")[0]]:
            variants["dense"] = by_matrix
        variants = {
            variant: training(lambda x, a, b, n=n, product=product: product(x[None], a[None], b[None], n), x, *factors)
            for variant, product in variants.items()
        }
        rows.append({"structure": name, "width": n, "tokens": t, **milliseconds(variants, seconds)})
    return rows


class OneGemm(torch.autograd.Function):
    """x @ (W + circ(v))^T with the gradient of v from the FFTs of x and of the incoming gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, column: Tensor) -> Tensor:
        n = len(column)
        merged = weight + Circulant().dense(column, torch.ones_like(column), n, n)
        ctx.save_for_backward(x, merged)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, merged = ctx.saved_tensors
        correlation = torch.linalg.vecdot(torch.fft.rfft(x), torch.fft.rfft(grad), dim=0)
        return grad @ merged, None, torch.fft.irfft(correlation, n=x.shape[-1])


def parallel(shapes: list[tuple[int, int]], seconds: float) -> list[dict]:
    rows = []
    for n, t in tqdm(shapes, desc="parallel"):
        x = torch.randn(t, n, requires_grad=True)
        weight = torch.randn(n, n)
        down, up = torch.randn(8, n, requires_grad=True), torch.randn(n, 8, requires_grad=True)
        left, right = torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True)

        def circulant(x, left, right, method, n=n):
            return getattr(Circulant(), f"{method}_matmul")(x[None], left[None], right[None], n)[0]

        def base(x, weight=weight):
            return F.linear(x, weight)

        def lora(x, down, up, weight=weight):
            return F.linear(x, weight) + F.linear(F.linear(x, down), up)

        def fft(x, left, right, weight=weight, circulant=circulant):
            return F.linear(x, weight) + circulant(x, left, right, "fft")

        def autograd_fft(x, left, right, weight=weight, n=n):
            spectrum = torch.fft.rfft(x) * torch.fft.rfft(left * right)
            return F.linear(x, weight) + torch.fft.irfft(spectrum, n=n)

        def dense(x, left, right, weight=weight, circulant=circulant):
            return F.linear(x, weight) + circulant(x, left, right, "dense")

        def one_gemm(x, left, right, weight=weight, n=n):
            return F.linear(x, weight + Circulant().dense(left, right, n, n))

        def one_gemm_fft_gradient(x, left, right, weight=weight):
            return OneGemm.apply(x, weight, left * right)

        variants = {"base alone": training(base, x), "LoRA r=8": training(lora, x, down, up)}
        variants |= {
            name: training(run, x, left, right)
            for name, run in {
                "base + fft": fft,
                "base + fft by autograd": autograd_fft,
                "base + dense": dense,
                "one GEMM": one_gemm,
                "one GEMM, fft gradient": one_gemm_fft_gradient,
            }.items()
        }
        rows.append({"width": n, "tokens": t, **milliseconds(variants, seconds)})
    return rows


class DiagonalSums(torch.autograd.Function):
    """A circulant matrix as a strided view; its gradient sums the diagonals of a doubled matrix."""

    @staticmethod
    def forward(ctx, column: Tensor) -> Tensor:
        n = len(column)
        return torch.cat([column[1:], column]).as_strided((n, n), (1, 1)).flip(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        n = len(grad)
        return torch.cat([grad, grad], 1).as_strided((n, n), (2 * n + 1, 1), 1).sum(0).flip(0)


def building(widths: tuple[int, ...], seconds: float) -> list[dict]:
    rows = []
    for n in tqdm(widths, desc="building"):
        column = torch.randn(n, requires_grad=True)
        index = (torch.arange(n)[:, None] - torch.arange(n)) % n
        ones = torch.ones(n)
        variants = {
            "index": training(lambda v, index=index: v[index], column),
            "unfold": training(lambda v, ones=ones, n=n: Circulant().dense(v, ones, n, n), column),
            "as_strided": training(lambda v, n=n: torch.cat([v[1:], v]).as_strided((n, n), (1, 1)).flip(1), column),
            "as_strided, diagonal sums": training(DiagonalSums.apply, column),
        }
        rows.append({"width": n, **milliseconds(variants, seconds)})
    return rows


def table(title: str, rows: list[dict]) -> None:
    print(f"\n{title} (ms, forward and backward)")
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("  ".join(f"{name:>12}" for name in names))
    for row in rows:
        print("  ".join(f"{row.get(name, '-')!s:>{max(12, len(name))}}" for name in names))


def crossings(rows: list[dict]) -> dict[str, dict[str, int | None]]:
    """By structure and tokens, the largest measured width at which dense is not slower."""
    found: dict[str, dict[str, int | None]] = {}
    for row in rows:
        if "fft" in row:
            best = found.setdefault(row["structure"], {}).setdefault(str(row["tokens"]), None)
            if row.get("dense", float("inf")) <= row["fft"]:
                found[row["structure"]][str(row["tokens"])] = max(best or 0, row["width"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes, nothing written")
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    widths, tokens = ((64, 384), (1, 1024)) if arguments.quick else (WIDTHS, TOKENS)
    shapes = [(384, 1024), (384, 2048), (768, 1024), (768, 2048)]
    result = {
        "command": " ".join(["python", "benchmarks/surm_products.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "dense_up_to": {name: get_structure(name).dense_up_to for name in STRUCTURES if name != "kronecker"},
        "parallel": parallel(shapes[:1] if arguments.quick else shapes, 4 * arguments.seconds),
        "building": building((384,) if arguments.quick else (384, 768), arguments.seconds),
        "products": products(widths, tokens, arguments.seconds),
    }
    result["dense_wins_up_to"] = crossings(result["products"])
    table("Parallel", result["parallel"])
    table("Building", result["building"])
    table("Products", result["products"])
    print("\nThe largest measured width at which dense is not slower, by tokens:")
    for structure, by_tokens in result["dense_wins_up_to"].items():
        print(f"  {structure:10}", by_tokens)
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten to {RESULTS.relative_to(Path(__file__).parents[1])}")


if __name__ == "__main__":
    main()
