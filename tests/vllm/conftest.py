"""vLLM has an environment of its own: `make test-vllm`. Where it is not installed, nothing here is collected."""

import gc
import importlib.util
import os

import pytest


if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)


@pytest.fixture(scope="module")
def start():
    """Start engines of a module, each after the one before it has been shut down."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def stop():
        gc.collect()
        cleanup_dist_env_and_memory()

    def start(path, hyperadapt=True, **settings):
        stop()
        settings = {"max_loras": 4, "max_num_seqs": 32, "enforce_eager": True, **settings}
        return LLM(
            str(path),
            dtype=settings.pop("dtype", "float32"),
            skip_tokenizer_init=True,
            enable_lora=True,
            max_model_len=64,
            seed=0,
            additional_config={"hyperadapt": True} if hyperadapt else {},
            **settings,
        )

    yield start
    stop()
