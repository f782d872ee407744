# Two commands for everyone: `make demo` and `make test`. Both set up their own .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Threads that spin while they wait slow each other down tenfold as soon as a core is shared.
export OMP_WAIT_POLICY ?= PASSIVE

# A file of tests stays with one process, so that what it trains is trained once; each process on a core of its own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test lint types fast slow docs clean

$(VENV)/.ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "Installing nnU-Net, PyTorch and this project into $(VENV) (some gigabytes, a few minutes)"
	$(BIN)/pip install --quiet --editable '.[test,lint,docs]' --constraint constraints.txt
# What the parity tests compare with. It asks for an old version of requests, which it does not need here.
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1
	touch $@

# make demo [DATA=<task folder of the Decathlon>] [DEMO=<where to work>]
demo: $(VENV)/.ready
	$(BIN)/nnunet_ima demo --output $(DEMO) $(if $(DATA),--data $(DATA))

test: lint types fast

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

# trainers/ and evaluation/ are mapped into the package at installation; mypy needs to see them in place.
types: $(VENV)/.ready
	rm -rf build/types && mkdir -p build/types/nnunet_ima
	ln -s $(CURDIR)/nnunet_ima/* $(CURDIR)/trainers $(CURDIR)/evaluation build/types/nnunet_ima/
	MYPYPATH=build/types $(BIN)/mypy -p nnunet_ima
	MYPYPATH=build/types $(BIN)/mypy benchmarks

fast: $(VENV)/.ready
	$(PYTEST)

slow: $(VENV)/.ready
	$(PYTEST) -m slow

# The site, in build/site; a dead link or anchor fails. The fast tests build it in the same way.
docs: $(VENV)/.ready
	rm -rf build/site
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs build/site --doctree-dir build/doctrees
	@echo "Open build/site/index.html"

clean:
	rm -rf $(VENV) build *.egg-info
