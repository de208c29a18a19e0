# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart simulated test test-engines test-models test-kills test-deepspeed
.PHONY: check format clean bench

setup: $(STAMP)

# The CPU build of vLLM brings torchvision, torchaudio and torchcodec builds that may not match its
# torch, and then `import transformers` fails. Nothing here needs them.
$(STAMP): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $@

quickstart: setup
	$(BIN)/python -m copris_lightning.quickstart.warm_start --output .cache/quickstart
	$(BIN)/copris fit --config configs/quickstart.yaml

simulated: setup
	$(BIN)/python -c "from copris_lightning.quickstart.warm_start import tiny_model; tiny_model('.cache/tiny')"
	$(BIN)/copris fit --config configs/simulated.yaml

test: setup
	$(BIN)/python -m pytest

# What takes too long for `make test`, which has one of each, another every day: these run all.
# ARGS="-k sync" takes a part.

# Whole fits with an engine of their own.
test-engines: setup
	$(BIN)/python -m pytest -m engines $(ARGS)

# Every architecture of docs/models.md; half an hour on two cores.
test-models: setup
	$(BIN)/python -m pytest -m models $(ARGS)

# Runs and engines ended by each signal, in each process, in each phase; two hours.
test-kills: setup
	$(BIN)/python -m pytest -m kills $(ARGS)

# Every way to train under DeepSpeed, on two CPU processes.
test-deepspeed: setup
	$(BIN)/python -m pytest -m deepspeed $(ARGS)

# How fast everything is, half an hour on two idle cores: benchmarks/README.md says how
# to read it. ARGS="--quick" only shows that it runs; BENCHMARKS="rollout sync" takes some.
BENCHMARKS ?= rollout cap training_step scoring resume sync scheduler scale rewards
bench: setup
	set -e; for name in $(BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --output runs/bench $(ARGS); \
	done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache runs
