# `make demo` and `make test` set themselves up: a virtual environment in .venv, with what constraints.txt pins.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Tried only if torch's CPU build is not found where pip looks already.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# A process that may not keep what it has compiled compiles all of torch anew, for five seconds.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: demo test check tried tools test-slow test-install test-oldest test-newest docs docs-serve bench fuzz web tables sanitize \
  format clean

demo: $(VENV)/.zoo  ## prune a LeNet to a sixtieth on real digits, in under two minutes
	$(VENV)/bin/pomona train demo --threads 1 --out runs/demo

test: $(VENV)/.test  ## two or three minutes, for every change: ruff, mypy, the walls between modules, pytest
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports
	$(RUN) pytest -n 2 --dist worksteal

# With CI set, a test that is skipped fails, unless MAY_SKIP in conftest.py has its reason.
check: tools $(VENV)/.test build/foreign/.installed  ## some twenty minutes, before a merge: all tests, with coverage and more examples; sanitizers
	$(MAKE) sanitize
	$(RUN) coverage erase
	$(RUN) coverage run -m pytest -n 2 --dist worksteal -m 'not slow' --hypothesis-profile check $(if $(CI),--no-skips)
	$(RUN) coverage run -m pytest -n 2 --dist worksteal -m 'not slow' $(if $(CI),--no-skips) tests/foreign
	$(RUN) coverage combine --quiet
	$(RUN) coverage report

# The models of others that tests/foreign tries: 125 MB to load, in a folder of their own. requirements.txt there says why.
build/foreign/.installed: tests/foreign/requirements.txt | $(VENV)/.test
	rm -rf $(@D)
	$(INSTALL) --no-deps --target $(@D) -r $<
	@touch $@

tried: $(VENV)/.test build/foreign/.installed  ## three minutes: docs/tried.md anew, the page of what came out
	$(RUN) tests.foreign.page

# What tests need and pip does not install: a browser, and a compiler for WebAssembly. CMake and a C++ compiler stand in
# docs/install.md too; node is to be newer than Debian's.
PROGRAMS := chromium=chromium,chromium-browser,google-chrome clang=clang++ lld=wasm-ld cmake=cmake g++=c++
tools:  ## programs that `make check` needs: installed where this may be done (root on Debian), else named
	@for each in $(PROGRAMS); do \
	  which $$(echo "$${each#*=}" | tr , ' ') 2>/dev/null | grep -q . || missing="$$missing $${each%%=*}"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; \
	else \
	  echo "make check: not installed here, so what needs it is skipped:$$missing"; \
	fi

test-slow: $(VENV)/.test  ## up to an hour: outcomes on real MNIST (POMONA_DATA), tutorials and examples as they stand
	$(RUN) pytest -m slow

test-install: $(VENV)/.test  ## minutes: sdist and wheels into clean environments, with a compiler, without, and a broken one
	$(RUN) pytest -m slow tests/docs/test_install.py

# The suite without the integrations, on the ends of what docs/install.md says is supported, in environments of their own.
test-oldest: PINS := 'torch==2.6.*' 'numpy==1.26.*'
test-newest: PINS := torch numpy
test-oldest test-newest: test-%:  ## make PYTHON=python3.10 test-oldest; make PYTHON=python3.13 test-newest
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --upgrade --extra-index-url $(TORCH_INDEX) \
	  $(PINS) -e '.[zoo,onnx]' safetensors pyyaml pytest hypothesis pytest-xdist
	build/$*/bin/python -m pytest -n 2 -m 'not slow' --ignore=src/pomona/integrations \
	  --ignore=tests/integrations --ignore=tests/foreign --ignore=tests/docs/test_examples.py

docs: $(VENV)/.test  ## the site, into build/site; open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

docs-serve: $(VENV)/.test  ## the site on http://localhost:8000, built anew at every change
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs serve

bench: $(VENV)/.test  ## half an hour on a quiet machine: what pruning costs, into bench/results/speed
	for what in step cut growth scale memory; do $(VENV)/bin/python bench/speed.py $$what || exit 1; done

fuzz: $(VENV)/.test  ## minutes: 100,000 damaged and hostile files, and as many graphs; make fuzz FUZZ="--seed 1 --cases 1000000"
	$(RUN) tests.fuzz.container $(FUZZ)
	$(RUN) tests.fuzz.graph $(FUZZ)

web:  ## the core for browsers, web/pomona.wasm: after a change of the core; needs clang and lld
	$(PYTHON) web/build.py

tables: $(VENV)/.test  ## after a change of the runtime's operations: the tables that C, JavaScript and docs have of them
	$(VENV)/bin/python core/tables.py

sanitize:  ## random calls of the compiled core under the sanitizers, without Python
	for kinds in address,undefined thread; do \
	  cmake -S core -B build/$$kinds -DPOMONA_TESTS=ON -DPOMONA_SANITIZE=$$kinds && \
	  cmake --build build/$$kinds --parallel 2 --target fuzz fuzz_net && build/$$kinds/fuzz && build/$$kinds/fuzz_net || exit 1; \
	done

format: $(VENV)/.test
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build src/pomona/native/_core.*

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Pomona needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.zoo: EXTRA := zoo
$(VENV)/.test: EXTRA := test
CORE := hatch_build.py $(wildcard core/CMakeLists.txt core/include/* core/src/*)
$(VENV)/.zoo $(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt $(CORE)
	$(INSTALL) -e '.[$(EXTRA)]' || $(INSTALL) --extra-index-url $(TORCH_INDEX) -e '.[$(EXTRA)]'
	@touch $@
