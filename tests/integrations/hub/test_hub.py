"""Push and pull through the real `huggingface_hub` client, over HTTP, in a process of their own: see checks.py."""

import os
import subprocess
import sys
from pathlib import Path


def test_hub():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.integrations.hub.plugin", str(here / "checks.py")]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in offline}
    done = subprocess.run(command, cwd=here.parents[2], env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
