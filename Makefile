# Every target works from a fresh clone: the virtual environment is made and filled when it is missing, and
# again after a change of pyproject.toml or of the pinned versions.

PYTHON ?= python3
WORKERS ?= 2

# Byte code is kept, whatever the environment says: without it each process compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
FLOOR := .venv-floor
PINS := constraints.txt
FLOOR_PINS := constraints-floor.txt constraints.txt
INPUTS := pyproject.toml constraints.txt scripts/install_torch.sh

# $(call install,folder,extra or nothing,pin files): the package in editable form, in its own virtual environment.
# Of several pins for one package the first counts, so the torch that is installed stays, whatever it is.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "cognexis needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@echo "installing cognexis $(2:%=with the extra % )into $(1)"
$(1)/bin/python -m pip install -qq --no-compile --upgrade --constraint constraints.txt pip
sh scripts/install_torch.sh $(1)/bin/python
{ $(1)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; \
	cat $(3); } | awk -F== '!/^#/ && !seen[$$1]++' > $(1)/pins.txt
$(1)/bin/python -m pip install -qq --no-compile --constraint $(1)/pins.txt --editable '.$(2:%=[%])'
endef

.PHONY: quickstart venv sandbox test test-slow test-floor acceptance lint clean

quickstart: $(VENV)/installed-quickstart
	$(VENV)/bin/python -m cognexis quickstart

venv: $(VENV)/installed-dev

lint: $(VENV)/installed-dev
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

# Programs that a model wrote run in bubblewrap; without it, and without the right to install it, their tests skip.
sandbox:
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get install -qq -y bubblewrap >/dev/null; } \
		|| echo "bubblewrap is missing: tests of the sandbox are skipped (apt-get install bubblewrap)"

test: lint sandbox
	$(VENV)/bin/python -m pytest -n $(WORKERS)

# Exit status 5 means that no test carries the mark.
test-slow: $(VENV)/installed-dev sandbox
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "slow and not vllm" || [ $$? -eq 5 ]
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m triton tests/kernels || [ $$? -eq 5 ]

# What uses transformers, on the oldest one that pyproject.toml allows.
test-floor: $(FLOOR)/installed-dev
	$(FLOOR)/bin/python -m pytest -n $(WORKERS) tests/checkpoints tests/hub tests/integration \
		tests/decoder/test_*cache*.py tests/decoder/test_*generation*.py tests/training/checkpointing \
		tests/training/test_*.py tests/test_*.py

acceptance: $(VENV)/installed-dev
	$(VENV)/bin/python scripts/acceptance.py

clean:
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed-quickstart: $(INPUTS)
	$(call install,$(VENV),,$(PINS))
	@touch $@

$(VENV)/installed-dev: $(INPUTS)
	$(call install,$(VENV),dev,$(PINS))
	@touch $@ $(VENV)/installed-quickstart

$(FLOOR)/installed-dev: $(INPUTS) constraints-floor.txt
	$(call install,$(FLOOR),dev,$(FLOOR_PINS))
	@touch $@
