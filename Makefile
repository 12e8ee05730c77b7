# One word per job. Each word makes .venv itself when it is missing.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: venv quickstart test check docs bench clean

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and pinned: any other order may pull a build with gigabytes of CUDA.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: venv
	$(BIN)/potstill run quickstart
	$(BIN)/potstill run quickstart-llm

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/methods.py --check

docs: venv
	$(BIN)/python scripts/methods.py
	$(BIN)/python scripts/mode_picture.py

# The peers bring a torchvision that does not fit a CPU build of torch, so they get an environment of their own.
bench: venv .venv-bench/ready
	for script in parity chunked loop language_speed language_peers; do .venv-bench/bin/python benchmarks/$$script.py || exit 1; done
	for script in cache gain health language on_policy cross_tokenizer quickstart_llm chaos elicit_speed requests_store \
		filters seeds; do $(BIN)/python benchmarks/$$script.py || exit 1; done

.venv-bench/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf .venv .venv-bench runs
