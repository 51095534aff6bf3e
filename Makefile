# Everything a developer or CI runs. Each target makes the environment first, so one line on a fresh machine is enough.

PYTHON ?= python3
EXTRAS ?= prep,train,dev
BIN := .venv/bin

.PHONY: env demo test check lowest format reference bench nodes clean

env: .venv/.made

# on a terminal pip shows its own progress; in a log there is a line for each step
.venv/.made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "1 of 3: $$($(PYTHON) --version) makes an empty environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "2 of 3: installing this checkout [$(EXTRAS)] with the releases of constraints.txt: a few minutes the first time"
	@test -t 1 || quiet=--quiet; $(BIN)/pip install $$quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@echo "3 of 3: $$(ls -d .venv/lib/*/site-packages/*.dist-info | wc -l) packages are in .venv; to use them: source .venv/bin/activate"
	@touch $@

demo: env
	$(BIN)/sft-prep build --mixture demo
	$(BIN)/sft-train --shards data_cache/demo --output runs/demo --nproc-per-node 1
	$(BIN)/sft-train ask runs/demo/model --questions prep/demo/heldout.jsonl --show 3
	@echo "loss plot: runs/demo/loss.png"

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

# the oldest releases that pyproject.toml allows: the tests of sft-prep, and a short part of sft-train's
LOWEST := .venv-lowest/bin
lowest: .venv-lowest/.made
	$(LOWEST)/python -m pytest -n 2 --dist loadfile -m 'not slow and not full' tests/prep \
		tests/train/model tests/train/test_config.py tests/train/publish/test_export.py tests/train/loop/test_rank.py tests/train/loop/test_loop.py

.venv-lowest/.made: pyproject.toml constraints-lowest.txt
	@test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	@$(LOWEST)/pip install --quiet -c constraints-lowest.txt -e '.[prep,train,lora,cluster]' hypothesis pytest pytest-xdist
	@touch $@

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the page that lists every key of a mixture and of a recipe
reference: env
	$(BIN)/python docs/generate_reference.py

bench: env
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

# two nodes with a network of their own, as root on Linux: the run between them, and its recovery from a cut link
nodes: env
	$(BIN)/python -m pytest -m full tests/train/launch/test_torchrun.py

# the demo's outputs and what tools leave behind; never your own shard sets and runs
clean:
	rm -rf runs/demo data_cache/demo build *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find prep train shared tests -name __pycache__ -prune -exec rm -rf {} +
