"""The pytest plugin that starts a Hub and points the client at it, before anything imports the client.

Load with `-p tests.integrations.hub.plugin`; the client reads its environment once, so the checks have a process of their own.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .server import Hub


_hub = Hub()
_home = tempfile.TemporaryDirectory()
os.environ.update(_hub.environment(Path(_home.name)))


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    _hub.start()
    yield _hub
    _hub.stop()
    _home.cleanup()
