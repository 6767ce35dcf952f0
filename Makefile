# Each task sets up by itself what it needs; all of it is cheap when nothing has changed. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
# What ARGS holds goes to the program that a task runs: make test-python ARGS='-k fork -x'
ARGS ?=

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(CURDIR)/.venv-peers
NODES := $(CURDIR)/.venv-nodes
export VIRTUAL_ENV := $(VENV)
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Lists the tasks
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 14

.PHONY: setup
setup: build ## Makes .venv with all that the other tasks need, torchshm in it

.PHONY: demo
demo: setup ## Stock PyTorch against torchshm on climate fields and flights
	@$(BIN)/torchshm demo $(ARGS)

.PHONY: test
test: test-cpp test-python ## The C++ tests, then the Python tests, on the build with failpoints

.PHONY: bench
bench: setup $(PEERS)/.installed ## The benchmarks, on the release build, with what they compare with in .venv-peers
	cmake --build --preset release --parallel $(JOBS)
	$(PEERS)/bin/python -m benchmarks $(ARGS)

.PHONY: lint
lint: $(INSTALLED) ## ruff, mypy, clang-format; changes nothing
	ruff check .
	ruff format --check .
	mypy
	find csrc docs tests benchmarks -name '*.h' -o -name '*.cc' | xargs -r clang-format --dry-run --Werror

.PHONY: torture
torture: build/dev/build.ninja ## The long tests, hours of them; writes tests/torture/RESULTS.md. ARGS='--only soak --minutes 5'
	$(BIN)/python tests/torture/campaign.py $(ARGS)

.PHONY: build
build: build/release/build.ninja ## After an edit in csrc/: the release module, built and copied into torchshm/
	cmake --build --preset release --parallel $(JOBS) --target python_modules
	cmake --install build/release --component python --prefix . | sed 's/^/  /'

.PHONY: test-cpp
test-cpp: build/dev/build.ninja ## The C++ tests alone
	cmake --build --preset dev --parallel $(JOBS)
	ctest --preset dev --parallel $(JOBS) $(ARGS)

.PHONY: test-python
test-python: build build/dev/build.ninja $(NODES)/.installed ## The Python tests alone
	cmake --build --preset dev --parallel $(JOBS) --target python_modules torchshm_store torchshmd
	PYTHONPATH=$(CURDIR)/build/dev/python $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: sanitize
sanitize: $(INSTALLED) ## The C++ tests and those of _C under ASan + UBSan and under TSan
	$(BIN)/python tests/torture/sanitizers.py --jobs $(JOBS) $(ARGS)

.PHONY: valgrind
valgrind: $(INSTALLED) ## The C++ tests under valgrind's memcheck: an hour
	@missing=valgrind
	command -v valgrind >/dev/null || { $(install_from_debian); }
	$(BIN)/python tests/torture/sanitizers.py --only valgrind --jobs $(JOBS) $(ARGS)

.PHONY: coverage
coverage: $(INSTALLED) ## Branch coverage of base, os and pool: build/torture/coverage/index.html
	$(BIN)/python tests/torture/coverage.py --jobs $(JOBS) $(ARGS)

.PHONY: tidy
tidy: clang-tidy build/tidy/build.ninja ## clang-tidy over the core and the C++ tests
	cmake --build --preset tidy --parallel $(JOBS)

.PHONY: format
format: $(INSTALLED) ## Formats all sources in place
	ruff check --fix .
	ruff format .
	find csrc docs tests benchmarks -name '*.h' -o -name '*.cc' | xargs -r clang-format -i

.PHONY: clean
clean: ## Removes what was built; .venv stays
	rm -rf build dist *.egg-info torchshm/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find csrc torchshm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and pinned: left to another package's requirement, pip would take the newest one with gigabytes
# of CUDA. The module itself is left to `make build`.
$(INSTALLED): pyproject.toml setup.py Makefile | system
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet '$(TORCH)' --group build --group lint --group torture
	TORCHSHM_SKIP_CMAKE=1 PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --check-build-dependencies \
		'$(TORCH)' --editable '.[bench,demo,test]'
	$(BIN)/pip install --quiet --group fuzz || echo 'atheris not installed: forged messages are fuzzed without its guidance' >&2
	touch $@

# Ray and Vineyard, with what they require, in an environment that sees all of .venv behind its own packages: .venv stays as it is.
$(PEERS)/.installed: pyproject.toml Makefile $(INSTALLED)
	$(PYTHON) -m venv --without-pip $(PEERS)
	place='import sysconfig; print(sysconfig.get_path("purelib"))'
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$place")')" > "$$($(PEERS)/bin/python -c "$$place")/beside.pth"
	$(PEERS)/bin/python -m pip install --quiet --group peers || echo 'Ray and Vineyard not installed: the benchmarks leave them out' >&2
	touch $@

# The torchdata that has torchdata.nodes and no DataLoader2 any more: a folder that tests put before what .venv has.
$(NODES)/.installed: pyproject.toml Makefile $(INSTALLED)
	rm -rf $(NODES)
	$(BIN)/pip install --quiet --no-deps --target $(NODES) --group nodes
	touch $@

build/%/build.ninja: CMakePresets.json $(INSTALLED)
	cmake --preset $*
	touch $@

# The few things that PyPI does not have. Where they can't be installed from here, what needs them says so.
define install_from_debian
failed=
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	echo "Installing from Debian:" $$missing
	export DEBIAN_FRONTEND=noninteractive
	{ apt-get update -q && apt-get install -qy --no-install-recommends $$missing; } >/dev/null || failed=1
else
	failed=1
fi
[ -z "$$failed" ] || echo "Not installed:" $$missing. "As root: apt-get install" $$missing >&2
endef

.PHONY: system
system:
	@missing=
	command -v c++ >/dev/null || missing+=' g++'
	command -v ccache >/dev/null || missing+=' ccache'
	[ -e /usr/include/gtest/gtest.h ] || missing+=' libgtest-dev'
	[ -e /usr/include/benchmark/benchmark.h ] || missing+=' libbenchmark-dev'
	[ -e /usr/include/relacy/relacy.hpp ] || missing+=' relacy-dev'
	command -v rumur >/dev/null || missing+=' rumur'
	command -v clang++-14 >/dev/null || missing+=' clang-14'
	compgen -G '/usr/lib/llvm-14/lib/clang/*/lib/linux/libclang_rt.fuzzer-*' >/dev/null || missing+=' libclang-rt-14-dev'
	command -v valgrind >/dev/null || missing+=' valgrind'
	command -v tmux >/dev/null || missing+=' tmux'
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing+=' python3-venv'
	headers=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
	[ -e "$$headers/Python.h" ] || missing+=' python3-dev'
	[ -n "$$missing" ] || exit 0
	$(install_from_debian)
	[ -z "$$failed" ] || echo '(`make test` needs libgtest-dev, relacy-dev, rumur, clang-14 and libclang-rt-14-dev; the others can be done without)' >&2

.PHONY: clang-tidy
clang-tidy:
	@missing=clang-tidy-14
	! command -v $$missing >/dev/null || exit 0
	$(install_from_debian)
