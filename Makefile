# `make demo` and `make test` are all there is to set up: both create .venv on first use and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/masters demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is written last and removed first: an interrupted install leaves half-copied packages that pip takes for whole, so without the stamp
# the environment is made anew. A changed pyproject.toml or constraints.txt updates it in place.
# The link gives mypy a folder called `masters`: the repository's root is that package, whatever the clone is called.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} found, 3.11 or newer needed: make PYTHON=python3.11")'
	@echo "Installing into $(VENV): about 2 GB (more where torch brings CUDA), a few minutes, only this once."
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/masters
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
