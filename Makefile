# Everything a person does with a clone of Hansa, one word each. `make` alone lists them.

SHELL := bash
BIN := .venv/bin
TEST_WORKERS ?= 2
SOAK_MINUTES ?= 10
FUZZ_REQUESTS ?= 20000
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench bench-market bench-training soak clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## set up .venv with the hansa command (TORCH_INDEX=… chooses torch's build, PYTHON=… the interpreter)
	@deploy/install.sh

demo: install ## run a whole market on this machine and train real jobs in it (KEEP=1 leaves it running)
	@$(BIN)/hansa demo $(if $(KEEP),--keep)

test: install ## run every test (TEST_WORKERS=… processes); with CI=true a skipped test is a failure
	@deploy/test_parts.sh
	@$(BIN)/pytest --numprocesses $(TEST_WORKERS) --dist loadgroup --ignore=tests/journey $(PYTEST_ARGS)
	@$(BIN)/pytest tests/journey $(PYTEST_ARGS)

lint: install ## check formatting, style, types and the direction of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: install bench-market ## print the benchmark tables, the market's first
	@shopt -s nullglob; for file in tests/benchmarks/bench_*.py; do PYTHONPATH=. $(BIN)/python "$$file" || exit 1; done

bench-market: install ## hold the optimiser against Gavel, Sia, POP and greedy rules (QUICK=1, TABLE=speeds.csv, ONLY=O7, JSON=out.json)
	@$(BIN)/python -c 'import clarabel, cvxpy, ecos' 2>/dev/null || \
		$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint deploy/constraints.txt --editable '.[peers]'
	@$(BIN)/hansa market compile
	@$(BIN)/pytest --quiet tests/benchmarks/market/test_peers.py
	@PYTHONPATH=. $(BIN)/python -m tests.benchmarks.market.bench_market $(if $(QUICK),--quick) \
		$(if $(TABLE),--table $(TABLE)) $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--json $(JSON))

bench-training: install ## hold training across sites against DDP, fp32 and plain TCP on an emulated network (QUICK=1, ONLY=T1, ONLY=peers, LONG=1, JSON=out.json)
	@$(BIN)/hansa market compile
	@[ "$(ONLY)" != peers ] || $(BIN)/python -c 'import hivemind, torchft' 2>/dev/null || \
		$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint deploy/constraints.txt --editable '.[training-peers]' || \
		echo "the peers have no wheels for this Python; they are left out" >&2
	@PYTHONPATH=. $(BIN)/python -m tests.benchmarks.training.bench_training $(if $(QUICK),--quick) \
		$(if $(LONG),--long) $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--json $(JSON))

soak: install ## run the long kills, fuzz the API (FUZZ_REQUESTS=…), then search for broken invariants with new seeds for SOAK_MINUTES
	@$(BIN)/hansa market compile
	@$(BIN)/pytest -m soak
	@HANSA_EXAMPLES=100 $(BIN)/pytest tests/broker/allocation/test_clearing_promises.py
	@$(BIN)/python -c 'import schemathesis' 2>/dev/null || \
		$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint deploy/constraints.txt --editable '.[fuzz]'
	@PYTHONPATH=. $(BIN)/python -m tests.broker.api.fuzz --requests $(FUZZ_REQUESTS)
	@$(BIN)/python -m tests.simulation --minutes $(SOAK_MINUTES)

clean: ## remove caches and build outputs; .venv stays
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
