"""Where PEFT's own tests come from, and the few lines in them that have to know a new method.

The tests are taken at run time from the source distribution of the installed PEFT and live in a cache, never in this
tree. `HYPERADAPT_CACHE` moves the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple


PACKAGE = "peft_tests"  # not "tests": this project has a package of that name

# Upstream turns deprecation warnings of transformers into errors. Not here: they are between PEFT and a transformers
# that is newer than it.
PYTEST_INI = """\
[pytest]
markers =
    single_gpu_tests: upstream's
    multi_gpu_tests: upstream's
    regression: upstream's
    bitsandbytes: upstream's
"""


class Patch(NamedTuple):
    """One edit of an upstream file: `old` must be there exactly `times` times, or the set-up stops."""

    file: str
    old: str
    new: str
    reason: str
    times: int = 1


# Upstream gates capabilities by class. `under_test(capability)` is a tuple: our config class if our method has the
# capability, else empty, so that upstream's own methods see exactly upstream's code. It is defined in plugin.py.
PATCHES = (
    Patch(
        "testing_common.py",
        "from diffusers import StableDiffusionPipeline",
        'StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})',
        "only for isinstance checks in Stable Diffusion tests, which do not run here: spares a heavy dependency",
    ),
    Patch(
        "test_low_level_api.py",
        "from diffusers import StableDiffusionPipeline",
        'StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})',
        "as in testing_common.py",
    ),
    Patch(
        "testing_common.py",
        "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig):",
        'if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, *under_test("conv1d")):',
        "stricter: transformers' Conv1D is supported, so GPT-2 is tested instead of skipped",
    ),
    Patch(
        "testing_common.py",
        "if config_cls not in (LoraConfig, RoadConfig):",
        'if config_cls not in (LoraConfig, RoadConfig, *under_test("mixed batches")):',
        "stricter: mixed batches are tested instead of skipped",
    ),
    Patch(
        "testing_common.py",
        "if config_cls not in (LoraConfig,):",
        'if config_cls not in (LoraConfig, *under_test("mixed batches")):',
        "stricter: mixed batches under beam search are tested instead of skipped",
    ),
    Patch(
        "test_decoder_models.py",
        'if config_cls != LoraConfig:\n            pytest.skip("Mixed',
        'if config_cls not in (LoraConfig, *under_test("mixed batches")):\n            pytest.skip("Mixed',
        "stricter: mixed batches are tested instead of skipped",
        times=2,
    ),
    Patch(
        "testing_common.py",
        'or "ia3" in name\n',
        'or "ia3" in name or (under_test("merge") and model.prefix in name)\n',
        "stricter: infinite scales must be refused by safe_merge too, not only NaN",
    ),
    Patch(
        "testing_common.py",
        "if not issubclass(config_cls, (LoraConfig, IA3Config)):\n            # This",
        'if not issubclass(config_cls, (LoraConfig, IA3Config, *under_test("weighted"))):\n            # This',
        "stricter: weighted combinations are tested instead of skipped",
    ),
    Patch(
        "testing_common.py",
        "elif isinstance(config, IA3Config):",
        'elif isinstance(config, (IA3Config, *under_test("weighted"))):',
        "and in the way of IA3, which has no rank either",
        times=2,
    ),
    Patch(
        "testing_common.py",
        "elif issubclass(config_cls, (LoHaConfig, LoKrConfig)) and model_id in (",
        'elif issubclass(config_cls, (LoHaConfig, LoKrConfig, *under_test("conv"))) and model_id in (',
        "outputs of these models are about 1e4, where 1e-6 relative is float32's rounding; LoRA is not merged here at all",
    ),
    Patch(
        "test_custom_models.py",
        "if issubclass(config_cls, (LoHaConfig, LoKrConfig)) and model_id in (",
        'if issubclass(config_cls, (LoHaConfig, LoKrConfig, *under_test("conv"))) and model_id in (',
        "upstream's tolerance for what scales grouped kernels: outputs of some hundreds after three steps at 0.01",
    ),
    Patch(
        "testing_common.py",
        'and ("fc1" in config.target_modules):',
        'and ("fc1" in str(config.target_modules)):',
        "upstream lowers the rank for narrow layers, but does not know them by their full names",
    ),
    Patch(
        "testing_common.py",
        "def _skip_if_merging_not_supported(model_id, config_cls, config_kwargs):\n",
        "def _skip_if_merging_not_supported(model_id, config_cls, config_kwargs):\n"
        '    if config_kwargs.get("placement") == "sequential":\n'
        '        pytest.skip("a sequential SURM adapter has a non-linearity: there is no weight to merge into")\n',
        "upstream's own gate for what cannot be merged; no other method has a `placement`",
    ),
    Patch(
        "test_low_level_api.py",
        'prefix = {LoraConfig: "lora_", LoKrConfig: "lokr_"}[config_cls]',
        'prefix = config_cls.__name__.removesuffix("Config").lower() + "_"',
        "says the same without a table of methods",
    ),
    Patch(
        "test_custom_models.py",
        '(config_kwargs.get("use_dora") and model_id == "EmbConv1D")\n            or',
        '(("use_dora" in config_kwargs or "placement" in config_kwargs) and model_id == "EmbConv1D")\n            or',
        "the model's one output learns slowly, and upstream's higher rate is needed by a sequential adapter too",
    ),
    Patch(
        "test_mixed.py",
        "from peft.utils import AuxiliaryTrainingWrapper, infer_device\n",
        "from peft.utils import AuxiliaryTrainingWrapper, infer_device\n"
        'LoKrConfig = (*under_test("mixed models"), LoKrConfig)[0]\n',
        "these tables are made while the module is imported: our method takes LoKr's place beside LoRA, LoHa and AdaLoRA",
    ),
    Patch(
        "test_target_parameters.py",
        'msg = "lora.ParamWrapper does not',
        'msg = "ParamWrapper does not',
        "the refusal names the tuner's own class",
        times=2,
    ),
    Patch(
        "test_custom_models.py",
        "(VBLoRAConfig, RandLoraConfig, UniLoraConfig, OSFConfig)",
        '(VBLoRAConfig, RandLoraConfig, UniLoraConfig, OSFConfig, *under_test("gain"))',
        "alpha is a gain: SGD at 0.5 diverges with it, as with the methods that upstream lists here",
    ),
    Patch(
        "test_target_parameters.py",
        "with pytest.raises(ValueError, match=msg):\n            self._test_weighted",
        'with pytest.raises(ValueError, match=msg) if not under_test("weighted") else torch.no_grad():\n'
        "            self._test_weighted",
        "stricter: adapters of parameters are combined instead of refused",
    ),
    Patch(
        "test_decoder_models.py",
        "if isinstance(config_cls, BeftConfig):\n        return\n",
        "if config_cls is not BeftConfig:\n        return\n",
        "upstream slip: a class is never an instance, so merge tests were skipped for all methods on Llama and Gemma3",
    ),
)


def cache_dir() -> Path:
    """Return the directory that holds everything fetched or built here."""
    return Path(os.environ.get("HYPERADAPT_CACHE", "~/.cache/hyperadapt_peft")).expanduser()


def once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cached directory `name`; `build` fills it the first time, and nobody ever sees it half filled."""
    target = cache_dir() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
            build(Path(tmp) / "new")
            try:
                (Path(tmp) / "new").rename(target)
            except OSError:  # another process was faster: its copy is as good
                if not target.exists():
                    raise
    return target


def digest(*paths: Path) -> str:
    """Return a short hash of the files that decide what is built, so that a change of them builds anew."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def fetch() -> Path:
    """Return PEFT's untouched `tests` directory: of the source tree `PEFT_SOURCE`, or of the installed release's
    source distribution, fetched through pip.
    """
    if source := os.environ.get("PEFT_SOURCE"):
        return Path(source) / "tests"
    release = version("peft")

    def build(target: Path) -> None:
        tmp = target.parent
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--dest", str(tmp), f"peft=={release}"], check=True)
        (archive,) = tmp.glob("peft-*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.name.startswith(f"peft-{release}/tests/")]
            tar.extractall(tmp, members=members, filter="data")
        (tmp / f"peft-{release}" / "tests").rename(target)

    return once(f"peft-{release}-tests", build)


def prepare() -> Path:
    """Return a directory with PEFT's tests as the package `PACKAGE`, patched, and a pytest configuration."""
    source = fetch()

    def build(target: Path) -> None:
        package = target / PACKAGE
        shutil.copytree(source, package)
        (package / "__init__.py").touch()
        (target / "pytest.ini").write_text(PYTEST_INI)
        for patch in PATCHES:
            file = package / patch.file
            text = file.read_text(encoding="utf-8")
            if (found := text.count(patch.old)) != patch.times:
                raise RuntimeError(
                    f"PEFT {version('peft')} changed: {patch.file} holds {found} times (expected {patch.times}) the "
                    f"text {patch.old!r}. Update PATCHES in {__file__}. Its purpose: {patch.reason}."
                )
            file.write_text(text.replace(patch.old, patch.new), encoding="utf-8")

    return once(f"conformance-{version('peft')}-{digest(Path(__file__))}", build)
