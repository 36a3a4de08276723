# `make chat` and `make test` set everything up by themselves; they need Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: chat ui serve test check format model experiment clean
.DEFAULT_GOAL := chat

chat: .venv/run.stamp
	@$(BIN)/octavo chat

# The chat page, and the OpenAI-compatible server, both on the shipped model.
ui: .venv/ui.stamp
	@$(BIN)/octavo ui

serve: .venv/ui.stamp
	@$(BIN)/octavo serve --ui

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The shipped model from nothing: text, tokenizer, an hour of training on two cores, evaluation.
model: .venv/test.stamp runs/menny/tokenizer.model
	$(BIN)/octavo train recipes/menny/config.toml
	$(BIN)/octavo train recipes/menny/stage2.toml
	$(BIN)/python recipes/menny/ship.py

# Mixture of experts against a dense model of the same active size; docs/experiments/moe-vs-dense.md.
experiment: .venv/test.stamp runs/menny/tokenizer.model
	$(BIN)/python recipes/moe_vs_dense/run.py

runs/menny/tokenizer.model: | .venv/test.stamp
	$(BIN)/python recipes/menny/corpus.py --out runs/menny/data --seed 1
	$(BIN)/python recipes/menny/corpus.py --out runs/menny/data2 --seed 2 --stage 2 --documents 80000
	$(BIN)/python recipes/menny/train_tokenizer.py --data runs/menny/data --out $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Octavo needs Python >= 3.11; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

BUILT := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.*)

.venv/run.stamp: $(BUILT) | $(BIN)/python
	@echo "setting up .venv (once, about a minute)" >&2
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/ui.stamp: $(BUILT) | $(BIN)/python
	@echo "setting up .venv for serving (once, some minutes)" >&2
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ui]'
	@touch $@ .venv/run.stamp

.venv/test.stamp: $(BUILT) | $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@ .venv/run.stamp .venv/ui.stamp

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
