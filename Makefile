# make quickstart   the whole job on a CPU: data, SFT, GRPO, evaluation, report (about 8 minutes after installation)
# make test         all CPU tests; make test-slow adds the three full quickstart seeds; make lint: ruff
PYTHON ?= python3
VENV ?= .venv
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-slow bench lint
quickstart: $(VENV)/installed
	$(VENV)/bin/actial quickstart

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow -s

bench: $(VENV)/installed
	$(VENV)/bin/python -m bench.data

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# torch comes first and pinned: an open request would fetch the CUDA build
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@
