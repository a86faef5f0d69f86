# Two commands: `make repro` (results and site) and `make test` (all tests). A third, for hours: `make study` (runs with several seeds). Both set up .venv from the lock when needed.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export PYTHONHASHSEED := 0
export GOMP_SPINCOUNT := 1000
# Packages are installed uncompiled; were Python told to write no caches, each start would compile torch again.
export PYTHONDONTWRITEBYTECODE :=

# Checksum, size and name of every module of the library.
SUMS := find moe_lab -name "*.py" -exec cksum {} + | LC_ALL=C sort

# Tests: memory that was freed stays with the process, up to 256 MB of it, instead of being asked for and cleared again at each step.
test: export MALLOC_TRIM_THRESHOLD_ := 268435456
test: export MALLOC_MMAP_THRESHOLD_ := 33554432

.PHONY: repro test study setup sync bench clock clean

repro: setup
	moe-lab repro
	@moe-lab done

test: setup sync
	export OMP_NUM_THREADS=1 TMPDIR=$$(mktemp -d); trap 'rm -rf "$$TMPDIR"' EXIT; nbdev_test --path nbs --n_workers 2
	pytest -n 3 --dist loadfile --no-loadscope-reorder

sync: setup                              # compares files, not commits: an edit that was exported passes before it is committed
	@before=$$($(SUMS)); nbdev_export || exit 1; \
	changed=$$(LC_ALL=C comm -3 <(echo "$$before") <($(SUMS)) | awk '{print $$3}' | sort -u); \
	[ -z "$$changed" ] || { echo "$$changed"; echo 'make: moe_lab/ was not what the notebooks export; commit the change above'; exit 1; }

study: setup                             # only what changed; killed, it goes on where it was; results of a clone need not be at hand
	@echo 'make: the runs of studies/params.yaml, once a seed: hours on two CPU cores, minutes on a GPU. Stop it at will: the same command goes on.'
	@moe-lab repro studies/dvc.yaml --allow-missing || { echo 'make: if a checkpoint is missing (it is not in git), make it again: dvc repro studies/dvc.yaml:STAGE, the stage that is named above'; exit 1; }

bench: setup
	moe-lab run nbs/pipeline/bench.ipynb --out bench -p threads=2 -p repeats=30
	moe-lab run nbs/pipeline/bench_moe.ipynb --out bench -p threads=2 -p repeats=15 -p scale=1
	moe-lab run nbs/pipeline/bench_dset.ipynb --out bench -p threads=2 -p repeats=5 -p scale=1
	moe-lab run nbs/pipeline/bench_bev.ipynb --out bench -p threads=2 -p repeats=9 -p scale=1
	moe-lab run nbs/pipeline/bench_nuscenes.ipynb --out bench -p repeats=3 -p samples=6019 -p beside=300
	moe-lab run nbs/pipeline/bench_aqr.ipynb --out bench -p threads=2 -p repeats=15 -p scale=1

clock: setup                             # times both commands on a fresh clone
	rm -rf build/clock && git clone -q . build/clock
	cd build/clock && $(CURDIR)/$(VENV)/bin/moe-lab stopwatch --out $(CURDIR)/bench/commands.json -- make repro
	cd build/clock && $(CURDIR)/$(VENV)/bin/moe-lab stopwatch --out $(CURDIR)/bench/commands.json -- make test

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo 'make: Python 3.11 is needed; name it with: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	@echo 'make: installing the packages of requirements.lock into $(VENV); once, one to three minutes'
	@$(PYTHON) -m venv $(VENV)
	@python -m pip install --no-compile -r requirements.lock 2>&1 | awk '/^ERROR|rror:/ {print} /^Collecting|^Installing/ {printf "."; fflush()} END {print ""}'
	@python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build site runs/*/.staging* runs/*/.resume runs/*/.failed studies/*/*/.staging* studies/*/*/.resume studies/*/*/.failed
