# make demo   install, build, and detect on the sample images with the sample model
# make test   install, build, lint, type-check and run the tests
# make bench  the benchmarks of the ops, and what the README's speed table quotes
# make gpu-check  all that only a GPU can tell: tests, kernels, layers, FPS; results to benchmarks/results/<gpu>

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
export CUDA_HOME ?= $(firstword $(wildcard /usr/local/cuda) $(wildcard /opt/cuda))

# The GPU check runs with what is there, also where nothing can be installed.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))

# Whose Python bindings, without the libraries, the tests hold the TensorRT engine against
TENSORRT := 10.16.1.11 11.4.0.106

.PHONY: install demo lint test bench gpu-check clean
.DELETE_ON_ERROR:

install: $(VENV)/.built

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=... ($(PYTHON) is $$($(PYTHON) --version))"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.requirements: pyproject.toml | $(VENV)/.created
	@echo "Installing PyTorch into $(VENV) (a minute or two)"
	@$(BIN)/python -m pip install --quiet "setuptools>=77" ninja "torch>=2.11"
	@touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.requirements
	@echo "Building the C++ operators and installing yolov4_fast"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

$(VENV)/.tools: $(SOURCES) | $(VENV)/.requirements
	@echo "Building the C++ operators and installing yolov4_fast with the tools for its tests"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test]'
	@$(BIN)/python -m pip install --quiet --no-deps tritonclient  # for the schema of config.pbtxt
	@for version in $(TENSORRT); do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade \
			--target $(VENV)/tensorrt/$${version%%.*} tensorrt_cu13_bindings==$$version || \
			echo "The bindings of TensorRT $$version are not to be had: tests that use them are skipped"; \
	done
	@touch $@ $(VENV)/.built

demo: install
	@mkdir -p demo
	$(BIN)/yolov4-fast build samples/shapes-nano.safetensors -o demo/shapes-nano.engine
	$(BIN)/yolov4-fast detect demo/shapes-nano.engine samples/images --save demo/pictures --json demo/detections.json

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files of tests side by side, each process with one thread: two of them would only get in each other's way
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

bench: $(VENV)/.tools
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf build demo *.egg-info yolov4_fast/*.so $(VENV)/.built $(VENV)/.tools
