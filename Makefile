# Everything starts from a clone with nothing but Python 3.10+ and make; .venv is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install run serve test test-long check bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: install
	$(BIN)/ray-retrieval run jobs/quickstart.yaml

serve: install
	$(BIN)/ray-retrieval serve runs/quickstart/index

# Two processes: which tests run in which, tests/conftest.py says.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The tests that `test` leaves out because they take long.
test-long: install
	$(BIN)/python -m pytest -m long

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/hamming_map.py
	$(BIN)/python benchmarks/search.py --short
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/local_search.py --short
	$(BIN)/python benchmarks/geometric_verification.py
	$(BIN)/python benchmarks/train_overhead.py
	$(BIN)/python benchmarks/encode_throughput.py
	$(BIN)/python benchmarks/export_engines.py --short
	$(BIN)/python benchmarks/xbm_step.py
	$(BIN)/python benchmarks/retrieval_metrics.py
	$(BIN)/python benchmarks/mining.py
	$(BIN)/python benchmarks/revisited_eval.py --dimension 512
	$(BIN)/python benchmarks/pyramid.py --short
	$(BIN)/python benchmarks/scaling.py --short
	$(BIN)/python benchmarks/index_soak.py --minutes 2
	$(BIN)/python benchmarks/serving.py --short
	$(BIN)/python benchmarks/serving_faults.py --minutes 1

clean:
	rm -rf .venv runs
