"""The OpenAI server, started as the page says: adapters loaded over HTTP while others are being used."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests

from .models import PROMPTS, TOKENS, alone, save_adapter, save_model, save_tokenizer
from .test_refusals import edit_config, edit_tensor


PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "serve-with-vllm.md").read_text()
TRAIN, REQUEST, OFFLINE = re.findall(r"```py(?:thon)?\n(.*?)```", PAGE, re.DOTALL)
_, SERVE, LOAD = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M"
COUNT = 62  # beside the page's two


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory in which the page's Hub id is a tiny model, after the page's training."""
    path = tmp_path_factory.mktemp("server")
    save_model("llama", path / MODEL)
    save_tokenizer(path / MODEL)
    subprocess.run([sys.executable, "-c", TRAIN], cwd=path, check=True)
    return path


@pytest.fixture(scope="module")
def url(directory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variable, *command = shlex.split(SERVE.replace("\\\n", ""))
    assert command[:3] == ["vllm", "serve", MODEL]  # which vLLM's packages for CPUs lack
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *command[2:]]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    log = directory / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            cwd=directory,
            env={
                **os.environ,
                **dict([variable.split("=")]),
                "VLLM_LORA_RESOLVER_CACHE_DIR": "adapters",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://localhost:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)


def load(url, path):
    adapter = {"lora_name": path.name, "lora_path": str(path)}
    return requests.post(f"{url}/v1/load_lora_adapter", json=adapter, timeout=60)


def test_the_page_loads_and_requests(url, directory):
    subprocess.run(LOAD.replace("http://localhost:8000", url), shell=True, cwd=directory, check=True)
    names: dict = {}
    exec(REQUEST.replace("http://localhost:8000", url), names)  # noqa: S102
    assert names["answer"].choices[0].text


def test_the_page_without_a_server(directory, monkeypatch, start):
    monkeypatch.chdir(directory)
    names: dict = {}
    exec(OFFLINE, names)  # noqa: S102
    assert [len(output.outputs[0].token_ids) for output in names["outputs"]]


def complete(url, name):
    answer = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).completions.create(
        model=name,
        prompt=" ".join(f"w{token}" for token in PROMPTS[0]),
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    return [int(word[1:]) for word in answer.choices[0].text.split()]


def test_adapters_over_http(url, directory, tmp_path):
    model = directory / MODEL
    adapters = [save_adapter(model, directory / f"served{i}", seed=i) for i in range(COUNT)]
    expected = alone(model, [None, *adapters], PROMPTS[:1])

    def assert_all(paths):
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda path: complete(url, path.name if path else MODEL), paths)
            for path, tokens in zip(paths, answers, strict=True):
                assert tokens == expected[path and str(path), tuple(PROMPTS[0])][0], path

    for path in adapters:
        assert load(url, path).ok
    models = openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list()
    assert {card.id for card in models.data} >= {MODEL, *(path.name for path in adapters)}
    assert_all([None, *adapters])

    bad = save_adapter(model, tmp_path / "bad")
    edit_tensor(bad, lambda key, x: (key, x[:-1]))
    answer = load(url, bad)
    assert answer.status_code == 500  # vLLM's for all that a loader raises but a directory that is not there
    assert "The adapter bad cannot be served: the row scales of model.layers.1.mlp.down_proj" in answer.text
    assert load(url, tmp_path / "nowhere").status_code == 404
    assert_all([None, *adapters[:8]])

    unload = {"lora_name": adapters[1].name}
    assert requests.post(f"{url}/v1/unload_lora_adapter", json=unload, timeout=60).ok
    with pytest.raises(openai.NotFoundError):
        complete(url, adapters[1].name)
    assert load(url, adapters[1]).ok
    assert_all([None, adapters[1]])


def test_adapters_found_by_name(url, directory):
    model = directory / MODEL
    names = ("found", "broken", "of-another-model", "group/inner")
    adapters = {name: save_adapter(model, directory / "adapters" / name, seed=9) for name in names}
    for name, path in adapters.items():
        edit_config(path, base_model_name_or_path="another" if name == "of-another-model" else MODEL)
    edit_tensor(adapters["broken"], lambda key, x: (key, x[:-1]))
    outside = save_adapter(model, directory / "outside")
    edit_config(outside, base_model_name_or_path=MODEL)
    ((tokens, _),) = alone(model, [adapters["found"]], PROMPTS[:1]).values()

    assert complete(url, "found") == complete(url, "group/inner") == tokens
    for name in ("of-another-model", "nowhere", "../outside", str(outside), str(adapters["found"].absolute())):
        with pytest.raises(openai.NotFoundError):
            complete(url, name)
    with pytest.raises(openai.BadRequestError, match="'broken' was found but could not be loaded"):
        complete(url, "broken")
    assert "The adapter broken cannot be served: the row scales of" in (directory / "server.log").read_text()
    assert complete(url, "found") == tokens
