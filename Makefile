# make demo: set up and run the main job.  make test: all tests.  make check: lint, format, types.
# make test-next: what has to work with transformer-lens 4, in an environment of its own.
# make real: a real model on real messages: fetch, run, report (DATA=folder with the SMS collection; the hub otherwise).
# make mutate: do the tests notice when the code is broken?
PYTHON ?= python3
BIN := .venv/bin
# Set-up is done once per change of the pinned versions or of pyproject.toml.
READY := .venv/.ready

.PHONY: demo test test-next real mutate check figures clean

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/mera demo

test: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-next: .venv-next/.ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-next/bin/python -m pytest tests/test_next.py tests/test_chat.py tests/test_checkpoint.py

real: $(READY)
	$(BIN)/python -m experiments.fetch_models --models smollm2 --into runs/models
	$(BIN)/mera run -m runs/models/smollm2 -t sms_spam --limit 150 --positions last --out runs/real \
		$(if $(DATA),--data-dir $(DATA))

mutate: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m experiments.mutations

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

figures: $(READY)
	$(BIN)/python -m figures

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mera_tl needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

.venv-next/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-next
	grep -v '^transformer-lens' constraints.txt > .venv-next/constraints.txt
	.venv-next/bin/pip install --quiet -c .venv-next/constraints.txt torch
	.venv-next/bin/pip install --quiet -c .venv-next/constraints.txt -e '.[gguf]' 'transformer-lens>=4,<5' pytest beartype
	touch .venv-next/.ready

clean:
	rm -rf .venv .venv-next build *.egg-info
