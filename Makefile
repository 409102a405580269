# Two commands do everything on a fresh machine: `make demo` trains and shows a model, `make test` runs every check.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The demo and the tests run on this torch everywhere; `pip install .` takes any torch >= 2.11.
TORCH  ?= torch==2.13.0

.PHONY: demo test lint clean install

# A new run's folder each time: what was trained before is kept.
demo: RUN := quickstart-$(shell date +%Y%m%d-%H%M%S)
demo: install
	$(BIN)/trainwright train quickstart name=$(RUN)
	$(BIN)/trainwright generate runs/$(RUN) --prompt 'Tom has 7 pens and buys 5 more. How many now?' \
		--prompt '小明有9个苹果,送出4个,还剩几个?'
	@echo 'open runs/$(RUN)/report.html; talk to it: $(BIN)/trainwright chat runs/$(RUN)'

# Byte code is kept: tests start many interpreters, each of which would compile the package again.
test: install lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=25 tests

lint: install
	$(BIN)/ruff check src tests benchmarks docs/*.py
	$(BIN)/ruff format --check src tests benchmarks docs/*.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/tour.py --check
	$(BIN)/python docs/planner.py --check
	$(BIN)/python docs/performance.py --check
	$(BIN)/python docs/layouts.py --check

install: $(VENV)/installed

# Wheels only: nothing is ever compiled here.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Trainwright needs Python >= 3.11, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --prefer-binary '$(TORCH)' -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs benches .pytest_cache .mypy_cache .ruff_cache
