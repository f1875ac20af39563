# Two commands do the work: `make patch && make bench`, and `make test`. `make help` lists the rest.
#
#   PYTHON=INTERPRETER  use this interpreter as it is, with the torch it has, in place of a virtual environment in .venv;
#                       nothing is installed into it
#   SDIST=FILE          the upstream archive, already on disk, in place of the package index
#   UPSTREAM=VERSION    another tested release of Transformers than the pinned one, until `make patch` without it
#   CONSTRAINTS=FILE    other versions than constraints.txt for what pip installs

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

JOBS ?= 2
ARGS ?= tests
CONSTRAINTS ?= constraints.txt
# Two test processes on two cores: each keeps to one thread, or they take turns.
TEST_THREADS ?= 1

fork_options = $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(if $(SDIST),--sdist '$(SDIST)')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifdef PYTHON
  python := $(PYTHON)
  venv :=
  installed :=
  # .cache/site holds the wheels of a bundle, if this checkout came from one.
  export PYTHONPATH := $(CURDIR)/transformers-dev/src:$(CURDIR):$(CURDIR)/.cache/site
else
  python := .venv/bin/python
  venv := .venv/bin/python
  installed := .venv/.installed
  # The first interpreter that is new enough and can make a virtual environment.
  find_python = for p in python3 python3.12 python3.11 python3.13; do \
      $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; \
    echo 'make: no Python 3.11 or later with venv found; install python3.11 and python3.11-venv, or set PYTHON=' >&2; exit 1
endif

.PHONY: help patch tree install model test soak load test-upstreams upstream-news lint bench bench-compare report picture plan-check refresh bundle clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16
	@sed -n '/^#   /p; /^SHELL/q' Makefile | cut -c 2-

patch: $(venv)  ## unpack the pinned upstream into transformers-dev, apply the patches, install [UPSTREAM=] [SDIST=]
	@$(python) patches/fork.py patch $(fork_options)
	@$(MAKE) install

install: tree $(installed)  ## install the patched tree and the package into .venv (part of the others)

# Like `patch`, but a tree with work of yours in it, or on another release that you chose, is used as it is.
tree: $(venv)
	@$(python) patches/fork.py patch --keep-edits $(fork_options)

.venv/bin/python:
	@python=$$($(find_python)); echo "making .venv with $$python"; rm -rf .venv; $$python -m venv .venv

# What the tree was built on; `tree` writes it where that changes.
.cache/built.txt: tree
	@test -f $@ || touch $@

.venv/.installed: pyproject.toml $(CONSTRAINTS) .cache/built.txt | tree
	@echo 'installing transformers-dev and kv_strategies into .venv (a few minutes at first)'
	@.venv/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) \
	  --editable transformers-dev --editable '.[bench,lint,test]'
	@touch $@

model: install  ## bring the default model and the text for the benches
	@$(python) -m kv_strategies.models fetch

test: install model  ## run the tests [ARGS=tests/test_paged.py] [JOBS=2]
	OMP_NUM_THREADS=$(TEST_THREADS) $(python) -m pytest $(if $(filter-out 0,$(JOBS)),-n $(JOBS) --dist worksteal) $(ARGS)

soak: install  ## drive every composition with faults, fresh seeds [MINUTES=10] [DEVICE=cuda] [ONLY= SEED= OPS= to replay]
	OMP_NUM_THREADS=1 $(python) tests/soak.py --minutes $(or $(MINUTES),10) --device $(or $(DEVICE),cpu) $(if $(ONLY),--only '$(ONLY)') \
	  $(if $(SEED),--seed $(SEED)) $(if $(OPS),--ops $(OPS))

load: install  ## thousands of requests through a pool of a twentieth of them [MINUTES=10] [DEVICE=cuda] [OUT=build/load]
	OMP_NUM_THREADS=1 $(python) tests/load.py --minutes $(or $(MINUTES),10) --device $(or $(DEVICE),cpu) \
	  --out '$(or $(OUT),build/load)'

test-upstreams: install model  ## run the equality tests on every release of patches/upstreams.txt
	@$(python) patches/fork.py upstreams --into build/upstreams
	@for tree in build/upstreams/*; do echo "== $$tree"; \
	  PYTHONPATH=$(CURDIR)/$$tree/src:$${PYTHONPATH:-$(CURDIR)} OMP_NUM_THREADS=$(TEST_THREADS) \
	    $(python) -m pytest -m upstream $(if $(filter-out 0,$(JOBS)),-n $(JOBS)) $(ARGS); done

upstream-news: install  ## which releases are newer than the tested ones, and whether the patches and tests fit them
	@$(python) patches/news.py

lint: install  ## check style and the layers: who may import whom
	@$(python) -m ruff check . && $(python) -m ruff format --check .
	@$(python) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-cache

# Exported as they were given and quoted by the shell: whatever they hold, a $ too, is one argument.
$(foreach name,MODEL SUITE ONLY OUT A B,$(eval override $(name) := $$(value $(name))))
export MODEL SUITE ONLY OUT A B
asked = $(filter-out 0 no false,$(1))
bench_out = $${OUT:+--out="$$OUT"}

bench: install model  ## measure every strategy and the native caches [MODEL= SUITE= ONLY= OUT= RESUME=1 KEEP_FAILURES=1]
	@$(python) -m bench $${MODEL:+--model="$$MODEL"} $${SUITE:+--suite="$$SUITE"} $${ONLY:+--only="$$ONLY"} $(bench_out) \
	  $(if $(call asked,$(RESUME)),--resume) $(if $(call asked,$(KEEP_FAILURES)),--keep-failures)

report: install model  ## write the tables, report.html (one page, all results) and results.csv from the results [OUT=]
	@$(python) -m bench report $(bench_out)

picture: install  ## of bench/results/report.html, as the README shows it; needs Chromium
	@$(python) -m bench picture $(bench_out)

bench-compare: install  ## what changed beyond noise between two results: folders, files or commits [A= B=]
	@$(python) -m bench compare "$$A" "$$B"

plan-check: install model  ## what `kv-strategies plan` would have said of the results, and by how much it errs [OUT=]
	@$(python) -m bench plan-check $(bench_out)

refresh: $(venv)  ## export the commits of transformers-dev into patches/ [CHECK=1] [FORCE=1]
	@$(python) patches/fork.py refresh $(if $(call asked,$(CHECK)),--check) $(if $(call asked,$(FORCE)),--force)

bundle: install model  ## write build/bundle/: everything a host without a network needs, in parts of at most 56 MiB
	@$(python) patches/bundle.py

clean:  ## remove .venv, build, caches and the patched tree (not the downloads, nor work of yours in the tree)
	@if [ -d transformers-dev/.git ]; then $(or $(PYTHON),python3) patches/fork.py clean; fi
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
