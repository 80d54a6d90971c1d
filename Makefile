# Everything starts from a clone with nothing but Python 3.10+ and make; .venv is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv/.peers

.PHONY: install run serve test test-long check docs bench bench-full clean

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

# Into site/; a warning, such as a link that leads nowhere, is an error. Nothing in it is fetched from elsewhere.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Other libraries to compare with, where there is a wheel of one: nothing is compiled, and scripts go on without.
$(PEERS): $(INSTALLED)
	@for peer in hnswlib usearch; do \
		$(BIN)/python -m pip install --quiet --only-binary $$peer --constraint constraints.txt $$peer || \
			echo "not installed: $$peer"; \
	done
	@touch $@

# Short forms, in 12 to 20 minutes, and long ones, in 1.5 to 3 hours; of a run that was interrupted, what is left:
# make bench BENCH=--resume
bench: install $(PEERS)
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-full: install $(PEERS)
	$(BIN)/python benchmarks/run.py --full $(BENCH)

clean:
	rm -rf .venv runs site
