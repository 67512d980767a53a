# `make demo` and `make test` are all that a newcomer needs: Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo r1-nano test prove plan lint clean
demo: $(VENV)/.run
	$(BIN)/python -m rl_reasoning.pipeline --config=configs/demo.py --workdir=runs/demo

r1-nano: $(VENV)/.run
	$(BIN)/python -m rl_reasoning.pipeline --config=configs/r1_nano.py --workdir=runs/r1_nano

test: $(VENV)/.dev $(VENV)/.sandbox $(VENV)/.tpu
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

prove: $(VENV)/.dev $(VENV)/.sandbox $(VENV)/.tpu
	$(BIN)/python -m pytest -m prove

plan: $(VENV)/.run $(VENV)/.tpu
	$(BIN)/python -m launch.plan_table --json=docs/results/plans.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python requirements.txt constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

# The TPU compiler, of the version that jax asks for, in a folder of its own: among the packages, every program here would look for a TPU.
# Where there is none (it is for Linux on x86-64), what needs it is skipped.
$(VENV)/.tpu: $(VENV)/.run
	@wanted=$$($(BIN)/python -c "import importlib.metadata as m; print(next(r.split(';')[0] for r in m.requires('jax') if r.startswith('libtpu')))"); \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/tpu "$$wanted" || echo "no TPU compiler here"
	@touch $@

# Rewards that run generated code need bubblewrap. Installed where we may; elsewhere they are refused, and their tests skipped.
$(VENV)/.sandbox: $(VENV)/bin/python
	@missing=; for tool in bwrap setpriv prlimit choom; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing bubblewrap and util-linux, for$$missing"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  timeout 120 apt-get update -qq >/dev/null 2>&1; \
	  timeout 300 apt-get install -y -qq --no-install-recommends bubblewrap util-linux >/dev/null 2>&1; \
	fi; true
	@touch $@
