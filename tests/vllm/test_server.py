"""The OpenAI server, started as a user starts it: adapters loaded over HTTP while others are being used."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from .models import PROMPTS, TOKENS, alone, save_adapter, save_model, save_tokenizer
from .test_refusals import edit_tensor


COUNT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = save_model("llama", tmp_path_factory.mktemp("server") / "model")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    return [save_adapter(model, tmp_path_factory.getbasetemp() / f"served{i}", seed=i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def url(model, adapters, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
    command += ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--served-model-name", "base"]
    command += ["--enable-lora", "--additional-config", '{"hyperadapt": true}', "--max-loras", COUNT]
    command += ["--lora-modules", f"served0={adapters[0]}"]
    log = tmp_path_factory.getbasetemp() / "server.log"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
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
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)


def load(url, path, name=None):
    adapter = {"lora_name": name or path.name, "lora_path": str(path)}
    return requests.post(f"{url}/v1/load_lora_adapter", json=adapter, timeout=60)


def test_adapters_over_http(url, model, adapters, tmp_path):
    expected = alone(model, [None, *adapters], PROMPTS[:1])
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

    def complete(path):
        answer = client.completions.create(
            model=path.name if path else "base",
            prompt=" ".join(f"w{token}" for token in PROMPTS[0]),
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return [int(word[1:]) for word in answer.choices[0].text.split()]

    def assert_all(paths):
        with ThreadPoolExecutor(16) as pool:
            for path, tokens in zip(paths, pool.map(complete, paths), strict=True):
                assert tokens == expected[path and str(path), tuple(PROMPTS[0])][0], path

    for path in adapters[1:]:
        assert load(url, path).ok
    assert len(client.models.list().data) == COUNT + 1
    assert_all([None, *adapters])

    bad = save_adapter(model, tmp_path / "bad")
    edit_tensor(
        bad, lambda key, x: (key, x[:-1]), "base_model.model.model.layers.1.mlp.down_proj.hyperadapt_row.weight"
    )
    answer = load(url, bad)
    assert answer.status_code == 500  # vLLM's for all that a loader raises but a directory that is not there
    assert "The adapter bad cannot be served: the row scales of model.layers.1.mlp.down_proj" in answer.text
    assert load(url, tmp_path / "nowhere").status_code == 404
    assert_all([None, *adapters[:8]])

    unload = {"lora_name": adapters[1].name}
    assert requests.post(f"{url}/v1/unload_lora_adapter", json=unload, timeout=60).ok
    with pytest.raises(openai.NotFoundError):
        complete(adapters[1])
    assert load(url, adapters[1]).ok
    assert_all([None, adapters[1]])
