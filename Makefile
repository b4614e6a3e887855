# Every target makes .venv itself, and makes it again only when one of the files that decide its contents changes.
# PYTHON: 3.11 to 3.13. PIP_ARGS: more arguments for pip, such as an index with another build of torch.
PYTHON ?= python3
PIP_ARGS ?=
READY := .venv/.ready
RUN := .venv/bin
PIP := $(RUN)/python -m pip install --quiet --no-input

.PHONY: demo test test-slow lint release bench bench-compare bench-embedded readme-tables docs docs-serve drawings

demo: $(READY)
	$(RUN)/ses-fast generate "two red squares left of three blue rings" --budget 50 --steps 8 --seed 1 --random-beside --out out/

# A process for each core, of one thread each (conftest.py): the tests' models are too small for two.
test: $(READY)
	$(RUN)/python -m pytest -q -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile

test-slow: $(READY)
	$(RUN)/python -m pytest -q -m slow

lint: $(READY)
	$(RUN)/ruff format --check
	$(RUN)/ruff check
	$(RUN)/mypy ses_fast kernels

# What is published, in dist/: built, installed in an empty environment and run there first.
release: $(READY)
	$(RUN)/python -m pytest -q tests/test_packaging.py
	$(RUN)/python -m build

# Every op, and whole searches with the embedded model, on the CPU: one file in bench/results. What fails leaves the rest.
# On a GPU machine the command is bench/gpu.sh.
bench: export CUDA_VISIBLE_DEVICES =
bench: $(READY)
	rm -f out/ops.json out/cpu.json out/searches.json
	status=0; \
	$(RUN)/python -m bench.ops --out out/ops.json || status=1; \
	$(RUN)/python -m bench.cpu --out out/cpu.json || status=1; \
	$(RUN)/python -m bench.end_to_end embedded --out out/searches.json || status=1; \
	$(RUN)/python -m bench.collect out/ops.json out/cpu.json out/searches.json || status=1; \
	exit $$status

bench-compare: $(READY)
	$(RUN)/python -m bench.compare

readme-tables: $(READY)
	$(RUN)/python -m bench.readme_tables
	PYTHONPATH=. $(RUN)/python tests/docs_tables.py

bench-embedded: $(READY)
	$(RUN)/python -m bench.embedded

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --quiet
	@echo site/index.html

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs serve

# The drawings of docs/how, anew.
drawings: $(READY)
	$(RUN)/python docs/drawings.py

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv --clear .venv
# pip's warnings, of indexes that lack a package, go to a file that is shown where the installation fails.
	$(PIP) --editable ".[dev]" --constraint constraints.txt $(PIP_ARGS) 2> .venv/pip.log || { cat .venv/pip.log >&2; exit 1; }
# The tests' oracle of HPSv2. It pins an old pytest and protobuf: it comes alone, what its scorer imports is in "dev".
	$(PIP) --no-deps hpsv2 --constraint constraints.txt $(PIP_ARGS) 2> .venv/pip.log || { cat .venv/pip.log >&2; exit 1; }
	touch $@
