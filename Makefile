# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
TRL := .venv-trl
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart simulated test test-engines test-models test-kills test-deepspeed
.PHONY: check format clean bench bench-trl compare

setup: $(STAMP)

# The CPU build of vLLM brings torchvision, torchaudio and torchcodec builds that may not match its
# torch, and then `import transformers` fails. Nothing here needs them.
$(STAMP): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $@

quickstart: setup
	$(BIN)/python -m copris_lightning.quickstart.warm_start --output .cache/quickstart
	$(BIN)/copris fit --config configs/quickstart.yaml
	$(BIN)/python -m copris_lightning.quickstart.compare --run configs/quickstart.yaml

# The quickstart and synchronous RL, by turns to the end: rates, and held-out reward over time.
compare: setup
	$(BIN)/python -m copris_lightning.quickstart.warm_start --output .cache/quickstart
	$(BIN)/python -m copris_lightning.quickstart.compare --run configs/quickstart.yaml \
		--ways '[carry-over, kept]' --batches 200 --turn 20 --held_out true $(ARGS)

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

# How fast everything is, an hour on two idle cores: benchmarks/README.md says how
# to read it. ARGS="--quick" only shows that it runs; BENCHMARKS="rollout sync" takes some.
BENCHMARKS ?= rollout cap training_step overlap scoring resume sync scheduler scale rewards end_to_end
bench: setup
	set -e; for name in $(BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --output runs/bench $(ARGS); \
	done

# End to end beside TRL, which gets an environment of its own; `make bench` then has it, too.
bench-trl: setup $(TRL)/.installed
	$(BIN)/python benchmarks/end_to_end.py --output runs/bench $(ARGS)

$(TRL)/.installed: pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(TRL) EXTRAS=cpu MORE='trl==1.16.*' bash scripts/setup.sh
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRL) .cache runs
