# `make demo` and `make test` do all set-up by themselves: they find a Python that OneFlow has
# a wheel for and build .venv with it, once. Nothing outside this folder is changed.

DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
DOCS_LOOK_ARGS ?=
PYTEST_WORKERS ?= 2

PYTHON := .venv/bin/python
APART := tests/rates tests/modes tests/checkpoint
SLOW_APART := tests/checkpoint/test_resume.py tests/checkpoint/test_resume_optimizers.py tests/rates
PYTEST = $(PYTHON) -m pytest -n $(PYTEST_WORKERS)
READY := .venv/.ready
DOCS_PYTHON := .venv-docs/bin/python
DOCS_READY := .venv-docs/.ready

# The tests start many processes, each of which would compile all it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow bench lint types wheel docs docs-look docs-serve doctor clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## fine-tune on digits, in graph mode (DEMO_ARGS="--epochs 1")
	@$(PYTHON) examples/digits_finetune.py --mode graph $(DEMO_ARGS)

# In parts, as the slow ones are, because OneFlow aborts a process that compiles some 1,365 graphs.
# pytest ends with 5 where a part has no test that was asked for.
test: $(READY)  ## run the tests but the slow ones (PYTEST_ARGS="-k rates")
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS) $(APART:%=--ignore %) || [ $$? -eq 5 ]
	@for part in $(APART); do $(PYTEST) -m "not slow" $(PYTEST_ARGS) $$part || [ $$? -eq 5 ] || exit; done

test-slow: $(READY)  ## run the slow tests
	@$(PYTEST) -m slow $(PYTEST_ARGS) $(SLOW_APART:%=--ignore %) || [ $$? -eq 5 ]
	@for part in $(SLOW_APART); do $(PYTEST) -m slow $(PYTEST_ARGS) $$part || [ $$? -eq 5 ] || exit; done

bench: $(READY)  ## run the benchmarks, write benchmarks/RESULTS.md (an hour on two idle cores)
	@$(PYTHON) benchmarks/run_all.py $(BENCH_ARGS)

lint: $(READY)  ## check style and layout with ruff
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: $(READY)  ## check types with mypy
	@$(PYTHON) -m mypy -p ofengine

wheel: $(READY)  ## build dist/ofengine-*.whl
	@rm -rf build dist
	@$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

docs: $(DOCS_READY)  ## build the documentation's site, in two languages, into site/
	@$(DOCS_PYTHON) docs/site/build.py

docs-look: docs  ## look at every page of it in Chromium (DOCS_LOOK_ARGS="--screenshots FOLDER")
	@$(DOCS_PYTHON) -m pip install --quiet -r docs/site/requirements-look.txt
	@$(DOCS_PYTHON) docs/site/look.py $(DOCS_LOOK_ARGS)

docs-serve: $(DOCS_READY)  ## build it and show it at http://127.0.0.1:8000
	@$(DOCS_PYTHON) docs/site/build.py --serve

doctor: $(READY)  ## say whether training can run here
	@$(PYTHON) -m ofengine doctor

clean:  ## remove .venv and everything that was built
	@rm -rf .venv .venv-docs build dist site ./*.egg-info .mypy_cache .pytest_cache .ruff_cache

# .venv holds this folder's path: one that came along with a copied or moved folder is not
# ready. One of a fitting Python is kept, and only brought up to date. flowvision comes as
# source whose setup.py needs pkg_resources: newer setuptools do not have it.
ifneq "$(shell cat $(READY) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(READY)
endif
$(READY): setup.cfg setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 8) <= sys.version_info[:2] <= (3, 10))' 2>/dev/null || \
		{ python=$$(.ci/find-python) && echo "Making .venv with $$python, once. OneFlow is large." && \
		"$$python" -m venv --clear .venv; }
	@$(PYTHON) -m pip install --quiet 'setuptools>=64,<81' wheel
	@$(PYTHON) -m pip install --quiet --no-build-isolation --editable '.[test,examples]'
	@pwd -P >$@

# The site's builder reads the package and does not import it: it needs no OneFlow, and a newer
# Python than OneFlow may have.
ifneq "$(shell cat $(DOCS_READY) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(DOCS_READY)
endif
$(DOCS_READY): docs/site/requirements.txt
	@for python in python3 "$$(.ci/find-python 2>/dev/null)" ''; do \
		"$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; \
	done; \
	if [ -z "$$python" ]; then echo "The site needs CPython 3.10 or newer with its venv package." >&2; exit 1; fi; \
	"$$python" -m venv --clear .venv-docs
	@$(DOCS_PYTHON) -m pip install --quiet --use-pep517 -r docs/site/requirements.txt
	@pwd -P >$@
