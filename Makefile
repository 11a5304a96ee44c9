# The two commands of the README are `make demo` and `make test`; both do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INPUTS := pyproject.toml constraints.txt
BENCH = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks
SMOLLM2 := smollm2-135m-instruct --batches 1 --size 8

.PHONY: demo test lint types unit wheel release docs bench results clean

# A small model pretrained on news learns Python code in few, large batches: full fine-tuning, LoRA and
# Muon on adapters, three seeds each, on two cores. It ends with the verdicts and where the page lies.
demo: $(VENV)/.demo
	$(BIN)/lorapro fetch llama-1m-bbc
	OMP_NUM_THREADS=1 $(BIN)/lorapro compare recipes/lab/demo.yaml --output_dir demo-output --processes 2

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -q -n $(WORKERS)

# The documentation into site/, which opens from there without a server; a warning, a link or an anchor
# that leads nowhere is an error. Links to other sites are listed in site/external-links.txt.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Build the source archive, from it the wheel, look inside; install the wheel alone, import it from there.
wheel: $(VENV)/.dev
	rm -rf build dist && $(BIN)/python tools/check_release.py --only wheel
	$(BIN)/python -m pip install -q --no-deps --target dist/installed dist/*.whl
	cd dist/installed && ../../$(BIN)/python -c "import lorapro, pathlib; \
	    path = pathlib.Path(lorapro.__file__); assert 'installed' in path.parts, path; \
	    print('wheel:', lorapro.__version__)"

# Before a release: an environment of its own for the core with torch alone and for each extra, each
# used for what it is for; minutes and gigabytes. RELEASE="--python python3.10 --only core hf"
release: $(VENV)/.dev
	$(BIN)/python tools/check_release.py $(RELEASE)

# Tables of speed and memory into benchmarks/results; see benchmarks/README.md. The one package of
# others that is compared with is not needed: without it its rows say so.
bench: $(VENV)/.dev
	-$(BIN)/python -m pip install -q --no-deps lora-pro-adamw==0.2.1
	$(BENCH)/step_time.py
	$(BENCH)/training_step.py --direct
	$(BENCH)/growth.py
	$(BENCH)/memory.py
	$(BENCH)/lora_ga_time.py --model minilm-l6
	$(BENCH)/lora_ga_time.py --model $(SMOLLM2) --methods lora sketch peft
	$(BENCH)/lora_ga_memory.py --model minilm-l6
	$(BENCH)/lora_ga_memory.py --model $(SMOLLM2)

# Every table and figure in results/ from the results.json beside it, a page of the tasks that share
# no runs with one another, and from these the tables and numbers of README and docs.
REPORTED := tweets fashion_mnist bbc_news gsm8k_smollm2
results: $(VENV)/.dev
	set -e; for file in $$(find results -name results.json); do folder=$$(dirname $$file); \
	    $(BIN)/lorapro report $$folder --output $$folder/table.md --figures $$folder > /dev/null; done
	$(BIN)/lorapro report $(REPORTED:%=results/%) --output results/report.html > /dev/null
	$(BIN)/lorapro report results/local_suite/*/ --output results/local_suite/report.html > /dev/null
	$(BIN)/lorapro report results/local_suite/*/ --output results/local_suite/summary.md > /dev/null
	$(BIN)/python docs/figures/alignment.py
	$(BIN)/python tools/fill_docs.py

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.docs: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.dev: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.demo $(VENV)/.docs

clean:
	rm -rf $(VENV) build dist site demo-output
