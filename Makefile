# `make demo` and `make test` need Python 3.11 or newer with its venv module, git and make; the rest they set up.

# The first of these that is new enough; choose another with `make PYTHON=/path/to/python ...`.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
# One process for each core, with one thread each: most tests are too small for two threads to help.
TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto
# `make bench PEERS=1` installs the rivals of benchmarks/peers.txt first; those that are missing are reported as such.
PEERS ?=
# The checkouts of `make compare`.
OLD ?=
NEW ?= .

# Installing one extra also installs those inside it.
HOLDS_demo := demo
HOLDS_test := demo test
HOLDS_docs := demo docs
HOLDS_dev := demo docs test dev

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo docs test test-all test-matrix bench gpu-check peers compare lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(VENV)/.ready-demo ## Set up, then answer the three questions on real data and write a report
	$(RUN) examples/demo.py $(ARGS)

test: $(VENV)/.ready-test ## Set up, then run the tests (pass more to pytest with ARGS="...")
	$(TESTS) -q $(ARGS)

test-all: $(VENV)/.ready-test ## The tests, the slow ones too
	$(TESTS) -q -m "slow or not slow" $(ARGS)

test-matrix: $(VENV)/.ready-test ## A smoke set on other releases of torch and Python, each in an environment of its own (ARGS="3.12:2.13.0")
	OMP_NUM_THREADS=1 $(RUN) tests/matrix.py $(ARGS)

bench: $(VENV)/.ready-test ## Time named rivals on the same work (choose with ARGS="products:C1"; PEERS=1 installs more)
	$(if $(PEERS),$(RUN) -m pip install -q --disable-pip-version-check --no-deps -r benchmarks/peers.txt)
	$(RUN) -W ignore -m benchmarks $(ARGS)

gpu-check: $(VENV)/.ready-test ## Check answers and speed on a GPU in ten minutes (ARGS="--device cpu --tiny" tries it without)
	$(RUN) -W ignore -m benchmarks.gpu_check $(ARGS)

peers: $(VENV)/.ready-test ## Set up an environment for each rival of benchmarks.influence_quality, in .peers
	@for list in benchmarks/peers/*.txt; do \
		own=.peers/$$(basename $$list .txt) && $(RUN) -m venv $$own && \
		$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
			> $$($$own/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth && \
		$$own/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $$list || exit 1; done

compare: $(VENV)/.ready-test ## Compare the speed of two checkouts (OLD=../old NEW=. ARGS="products:C1"); fails if NEW is slower
	$(if $(OLD),,$(error name the checkout to compare with, as in `make compare OLD=../old`))
	$(RUN) -W ignore -m benchmarks.compare $(OLD) $(NEW) $(ARGS)

docs: $(VENV)/.ready-docs ## Build the site in build/html, running its tutorials (open build/html/index.html)
	OMP_NUM_THREADS=1 $(RUN) -m sphinx -W --keep-going -q -b html docs build/html $(ARGS)
	@echo "Open build/html/index.html."

lint: $(VENV)/.ready-dev ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m pyright

format: $(VENV)/.ready-dev ## Put style right where that can be done by machine
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## Remove the environment, caches, build outputs and the report
	rm -rf $(VENV) .peers build dist report .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.created:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with 'make PYTHON=/path/to/python'."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.ready-%: pyproject.toml constraints.txt tests/clients.txt | $(VENV)/.created
	@echo "Installing jacops[$*] into $(VENV); the first time this takes some minutes."
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	$(if $(filter test dev,$*),$(RUN) -m pip install -q --disable-pip-version-check --no-deps -r tests/clients.txt)
	@touch $(HOLDS_$*:%=$(VENV)/.ready-%)
