# `make demo` and `make test` need nothing but Python 3.11 or later; everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
MEMBERS := shared services/teacher services/trainer services/adapter_api demo
INSTALLED := .venv/.installed
DEV_INSTALLED := .venv/.installed-dev

.PHONY: help setup demo test lint proto bench clean

help:
	@echo "make demo [DATA=file.parquet] [TOKENIZER=folder]   the whole loop on this machine"
	@echo "make test                                          the tests"
	@echo "make lint                                          ruff, mypy, import-linter"
	@echo "make bench                                         the benchmarks"
	@echo "make setup                                         only install"
	@echo "make proto                                         regenerate the gRPC stubs"
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

demo: $(INSTALLED)
	$(BIN)/hyperagent demo $(if $(DATA),--data "$(DATA)") $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)")

test: $(DEV_INSTALLED)
	$(BIN)/python -m pytest

lint: $(DEV_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(DEV_INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -Ihyperagent/wire=proto/hyperagent/teacher/v1 \
		--python_out=shared --pyi_out=shared --grpc_python_out=shared proto/hyperagent/teacher/v1/teacher.proto
	$(BIN)/python proto/record_contract.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/data.py

clean:
	rm -rf .venv runs
