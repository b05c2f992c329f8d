import shutil
from pathlib import Path

import pytest

from .attack import CONFIGS, save_good


@pytest.fixture(scope="session", params=CONFIGS)
def good(request, tmp_path_factory) -> Path:
    """A good adapter of each method."""
    path = tmp_path_factory.mktemp("good") / request.param
    save_good(request.param, path)
    return path


@pytest.fixture
def bad(good, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(good, tmp_path / "bad"))
