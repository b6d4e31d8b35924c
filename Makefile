PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest --quiet --numprocesses 2 --dist loadfile
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0

# Smaller than what these take by default: they would run for days on two cores.
FIGURES := --data figures/icons --out figures

.PHONY: demo test check figures install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python jobs/batch_personalize.py examples/catalog/manifest.csv --store demo-store

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m 'not cluster'

test: check
	$(PYTEST) -m cluster

figures: install
	$(BIN)/python benchmarks/paper.py $(FIGURES)/paper --seeds 2 --tuned-on 4 --reported-on 8
	$(BIN)/python benchmarks/robustness.py $(FIGURES)/robustness --recipe objdrive --objects 4
	$(BIN)/python benchmarks/scenes.py $(FIGURES)/scenes --recipe objdrive
	cp figures/paper/test/recognition.png docs/quality.png
	cp figures/paper/test/sheet.webp docs/quality-sheet.webp

clean:
	rm -rf $(VENV) demo-store
