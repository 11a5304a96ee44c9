# The two commands of the README are `make demo` and `make test`; both do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test lint types unit wheel bench clean

demo: $(VENV)/.demo
	$(BIN)/lorapro compare recipes/local/tweets_demo.yaml --output_dir demo-output

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -q -n $(WORKERS)

# Build the wheel, install it alone in a folder, import it from there.
wheel: $(VENV)/.dev
	rm -rf build dist && $(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m pip install -q --no-deps --target dist/installed dist/*.whl
	cd dist/installed && ../../$(BIN)/python -c "import lorapro, pathlib; \
	    path = pathlib.Path(lorapro.__file__); assert 'installed' in path.parts, path; \
	    assert (path.parent / 'py.typed').exists(); print('wheel:', lorapro.__version__)"

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.dev: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist demo-output
