# transom: `make run` and `make test` each do all that they need, from a fresh clone.
#
#   make run     the main job on this repository's README: a table here, a report in build/
#   make test    the tests, the linter and the type checker
#   make bench   measure this machine into bench/results/ (an hour and more), with a page in build/
#   make gpu     on a machine with a GPU: check, tune and measure the Triton kernels (hours), into
#                bench/results/<device>, with a table of the bars reached and not reached
#   make clean   remove what make made
#
# Settings: PYTHON=python3.12 (which Python the environment is made with), JOBS=4 (test processes),
#           TESTS="tests/ops -k route" (what pytest is given), TORCH=any (see below), VENV=folder.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
TESTS  ?=
# cpu: the CPU build of torch; any: what the package index has by default, on Linux the CUDA build.
TORCH  ?= $(shell nvidia-smi >/dev/null 2>&1 && echo any || echo cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_TORCH := torch==$(TORCH_VERSION)+cpu
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.DELETE_ON_ERROR:
.PHONY: run test lint types bench gpu clean

run: $(VENV)/installed
	@mkdir -p build
	$(BIN)/transom run --file README.md --html build/report.html --json build/report.json

# One thread a process: otherwise the test processes fight for the cores.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(TESTS)
	@$(MAKE) --no-print-directory lint types

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	@test -d build/ide || $(PIP) install -q --no-deps --no-build-isolation -e .
	$(BIN)/mypy

# The figures that are committed. What is interrupted goes on with what is saved: lines of the same
# measurement are replaced. Peers are what is installed in the environment.
RESULTS ?= bench/results/bench.jsonl
BENCH := $(BIN)/transom bench --save $(RESULTS)

bench: $(VENV)/installed
	@mkdir -p build
	$(BENCH) --tokens 1,8,64,512,2048 --context 1k,4k,16k,64k,256k,1M --whole
	$(BENCH) moe_experts --model v4-flash,qwen3-30b,gpt-oss-20b --tokens 1,8,64,512,2048 \
	    --format int8,int4,fp8,mxfp4
	$(BENCH) hashed_embedding hashed_embedding_out --model v4.1-flash --tokens 1,64,4096 \
	    --format plain,fp8,int8
	$(BENCH) moe_experts --model qwen3-30b --tokens 64 --experts 8,16,32,64
	$(BENCH) --tokens 1,512 --context 1k,64k --threads 1 --against composite
	$(BENCH) --tokens 512 --context 1k --dtype f32 --backward --against composite
	$(BIN)/transom bench --show $(RESULTS) --html build/bench.html
	$(BIN)/python -m transom.bench.bars $(RESULTS)

# Says what is missing where there is no GPU, and ends with status 2.
gpu: $(VENV)/installed
	$(BIN)/python -m transom.bench.gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment in three steps, each with a stamp, so that a later call starts where it must.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info < (3, 10) and \
	    sys.exit("make: $(PYTHON) is Python " + v + "; needs >= 3.10; make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV) || { rm -rf $(VENV); \
	    echo "make: no venv in $(PYTHON); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

# The CPU build is named 2.13.0+cpu. It is first asked of the indexes that pip is set up with (a
# mirror may have it), then of PyTorch's own. Where neither has it the plain build must do: on macOS
# and some processors it is a CPU build, elsewhere it is larger and works as well.
$(VENV)/torch: $(VENV)/created constraints.txt
ifeq ($(TORCH),cpu)
	@echo "make: installing torch $(TORCH_VERSION), CPU build, about 200 MB (TORCH=any for the other)"
	@$(PIP) install -c constraints.txt $(CPU_TORCH) 2>/dev/null || \
	$(PIP) install -c constraints.txt $(CPU_TORCH) --extra-index-url $(CPU_WHEELS) || \
	$(PIP) install -c constraints.txt torch==$(TORCH_VERSION)
else
	@echo "make: installing torch $(TORCH_VERSION), the index's default build"
	@$(PIP) install -c constraints.txt torch==$(TORCH_VERSION)
endif
	@touch $@

# setuptools and pybind11 come from the constraints too: hence no isolated build. The folder runtime
# is newer than the stamp when a file came or went: then the link tree in build/ide is out of date.
$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py runtime $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	@echo "make: installing transom, editable, and what its tests need"
	@$(PIP) install -q -c constraints.txt setuptools pybind11
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@
