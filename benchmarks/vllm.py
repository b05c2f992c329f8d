"""Many adapters in vLLM, each request with its own: HyperAdapt beside LoRA of ranks 1 and 8, and no adapters at all.

    python -m benchmarks.embedded smollm2
    .venv-vllm/bin/python -m benchmarks.vllm [--adapters 0 1 8 64] [--rounds 3] [--slots 1 64 512]

SmolLM2-135M in bfloat16, 64 requests of 32 tokens that each get 16 more, spread evenly over the loaded adapters (512
loaded are 64 distinct ones in a batch), and single requests of 128 tokens for the time to the first token. All engines
live at once, each in a process of its own with one thread, and are measured in turn. The numbers are seconds of the
process' processor time, the least of the rounds: what else a shared machine does only adds to them. With --slots, engines
of so many slots are first started one after the other, for the memory and the start of each. On CPUs vLLM's LoRA gathers
whole matrices for each token, on GPUs it has kernels: LoRA's rates here say nothing about GPUs. `make test-vllm` sets up
the environment. Writes benchmarks/results/vllm.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.embedded import DIRECTORY
from hyperadapt_peft import HyperAdaptConfig


REQUESTS, PROMPT, TOKENS, LONG, SINGLES = 64, 32, 16, 128, 4
METHODS = {
    "HyperAdapt": lambda: HyperAdaptConfig(init_weights=False, alpha=0.1),
    "LoRA r=1": lambda: LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
}


def save_adapters(model: str, directory: Path, count: int) -> dict[str, int]:
    """Save that many directories of each method, with the same values, which change no timing; return bytes per slot."""
    sizes = {}
    for method, config in METHODS.items():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config())
        adapted.save_pretrained(directory / method / "0")
        sizes[method] = 2 * sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        for i in range(1, count):
            (directory / method / str(i)).symlink_to(directory / method / "0")
    return sizes


class Engine:
    """A vLLM engine in a process of its own, which is given all requests of a batch before it begins."""

    def __init__(self, *settings) -> None:
        self.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.seconds_to_start, self.memory = self.call(start, *settings)

    def call(self, function, *args):
        return self.process.submit(function, *args).result()


def start(model: str, method: str | None, slots: int) -> tuple[float, int]:
    """Start this process' engine; return the processor time that it took, and the memory that the process has then."""
    global llm
    from vllm import LLM

    before = time.process_time()
    settings: dict = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": REQUESTS, "seed": 0}
    if method is not None:
        rank = 8 if method == "LoRA r=8" else 1
        settings |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": rank}
        settings["additional_config"] = {"hyperadapt": True} if method == "HyperAdapt" else {}
    llm = LLM(model, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False, **settings)
    return time.process_time() - before, psutil.Process().memory_info().rss


def load(adapters: list) -> None:
    for adapter in adapters:
        llm.llm_engine.add_lora(adapter)


def seconds(requests: int, prompt: int, tokens: int, adapters: list) -> float:
    """Return the processor time that a batch takes."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 3 for j in range(prompt)]} for i in range(requests)]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    chosen = [adapters[i * max(1, len(adapters) // requests) % len(adapters)] for i in range(requests)]
    before = time.process_time()
    llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
    return time.process_time() - before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(DIRECTORY / "smollm2"), help="a directory")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 64], help="how many are loaded")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--slots", type=int, nargs="+", default=[], help="of engines that are only started")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vllm.json")
    args = parser.parse_args()

    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    import vllm
    from vllm.lora.request import LoRARequest

    started = []
    for method in args.methods:
        for count in args.slots:
            engine = Engine(args.model, method, count)
            started.append((method, count, engine))
            engine.process.shutdown()
            print(method, count, f"slots: {engine.seconds_to_start:.1f} s, {engine.memory / 1e6:.0f} MB", flush=True)

    slots = max(*args.adapters, 1)
    with tempfile.TemporaryDirectory() as temporary:
        sizes = save_adapters(args.model, Path(temporary), slots)
        engines = {method: Engine(args.model, method, slots) for method in (None, *args.methods)}
        started += [(method, slots if method else 0, engine) for method, engine in engines.items()]
        variants = [(None, 0), *((method, count) for method in args.methods for count in args.adapters)]
        batches: dict = {variant: [] for variant in variants}
        singles: dict = {variant: [] for variant in variants}
        for round in range(args.rounds + 1):
            for method, count in variants:
                paths = [Path(temporary) / method / str(i) for i in range(count)] if method else []
                adapters = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(paths, 1)] or [None]
                engine = engines[method]
                if not round:
                    engine.call(load, [adapter for adapter in adapters if adapter])
                    engine.call(seconds, REQUESTS, PROMPT, 1, adapters)
                    continue
                batches[method, count].append(engine.call(seconds, REQUESTS, PROMPT, TOKENS, adapters))
                singles[method, count].append(sum(engine.call(seconds, 1, LONG, 1, adapters) for _ in range(SINGLES)))
                print(round, method, count, f"{batches[method, count][-1]:.2f} s", flush=True)

    base = min(batches[None, 0])
    results = {
        "command": " ".join(["python", "-m", "benchmarks.vllm", *sys.argv[1:]]),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, 1 thread of {os.cpu_count()}, load {os.getloadavg()[0]:.0f}",
        "rounds": args.rounds,
        "slots": slots,
        "bytes per slot": {method: sizes[method] for method in args.methods},
        "variants": [
            {
                "method": method or "no adapters enabled",
                "adapters": count,
                "tokens per second": round_to(REQUESTS * TOKENS / min(batches[method, count])),
                "of the engine without adapters": round_to(base / min(batches[method, count])),
                "ms to the first token": round_to(1000 * min(singles[method, count]) / SINGLES),
                "seconds of the rounds": [round_to(seconds) for seconds in batches[method, count]],
            }
            for method, count in variants
        ],
        "engines": [
            {
                "method": method or "no adapters enabled",
                "slots": count,
                "seconds to start": round_to(engine.seconds_to_start),
                "bytes of memory": engine.memory,
            }
            for method, count, engine in started
        ],
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def round_to(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    raise SystemExit(main())
