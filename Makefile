# The commands of this project. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
PLAYBOOK := .venv/bin/ansible-playbook
# More for ansible-playbook: make lab ARGS="-e testbed_memory=6144"
ARGS ?=
LAB ?= lab

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export ARGS
export XEN9P_STEPS := $(CURDIR)/.cache/steps
# These set nothing up: there are no steps before Ansible's to show.
stop reset teardown verify: export XEN9P_STEPS :=

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.PHONY: lab
lab: ## stand up the whole lab: Xen host, store, backend, guests
	@tools/bootstrap lab
	@$(PLAYBOOK) site.yml $(ARGS)

.PHONY: check
check: ## lint, types, unit tests, documentation
	@tools/bootstrap check
	@$(PYTHON) tools/check.py

.PHONY: test
test: ## check, and then everything again on nested Xen, from nothing (Molecule)
	@tools/bootstrap lab
	@$(PYTHON) tools/check.py --molecule

.PHONY: test-real-host
test-real-host: ## a Debian machine with GRUB becomes a Xen host, tested and removed (Molecule)
	@tools/bootstrap lab
	@PYTHONUNBUFFERED=1 .venv/bin/molecule test --scenario-name real_host

.PHONY: verify
verify: ## the tests of the lab that stands
	@tools/bootstrap installed
	@XEN9P_LAB=$(LAB) .venv/bin/pytest tests/lab --junit-xml=junit-lab.xml $(ARGS)

.PHONY: bench-quick
bench-quick: ## our backend and QEMU's side by side, on the lab that stands
	@tools/bootstrap check
	@$(PLAYBOOK) playbooks/bench.yml $(ARGS)

.PHONY: bench
bench: ## the full benchmark: fio and small files through seven ways to a file, on the lab that stands
	@tools/bootstrap check
	@$(PLAYBOOK) playbooks/bench.yml -e bench_profile=full -e bench_rounds=5 $(ARGS)

.PHONY: translations
translations: ## count what a file operation takes on each of five ways to a file, on the lab that stands
	@tools/bootstrap check
	@$(PLAYBOOK) playbooks/translations.yml $(ARGS)

.PHONY: bench-scaling
bench-scaling: ## what a request costs as fids, directories and devices grow; no Xen needed
	@tools/bootstrap check
	@$(PYTHON) tools/bench_scaling.py $(ARGS)

.PHONY: bench-dedup
bench-dedup: ## de-duplication of drifted guests, against duperemove on files and disk images; as root, no Xen needed
	@tools/bootstrap dedup
	@$(PYTHON) tools/bench_dedup.py $(ARGS)

.PHONY: bench-cache
bench-cache: ## boots that are read ahead of, streams, clones that share pages; as root, no Xen needed
	@tools/bootstrap dedup
	@$(PYTHON) tools/bench_cache.py $(ARGS)

.PHONY: bench-snapshot
bench-snapshot: ## snapshots of an export, against reflinks of a disk image; as root, no Xen needed
	@tools/bootstrap dedup
	@$(PYTHON) tools/bench_snapshot.py $(ARGS)

.PHONY: sanitize
sanitize: ## the tests that are mostly C, on a data plane with sanitizers: address and undefined, then thread
	@tools/bootstrap check
	@$(PYTHON) tools/sanitize.py --kind address --quick $(ARGS)
	@$(PYTHON) tools/sanitize.py --kind thread --quick $(ARGS)

.PHONY: fuzz
fuzz: ## hostile guests: make fuzz ARGS="--messages 10000000 --seed 7"; a minute without arguments
	@tools/bootstrap check
	@$(PYTHON) tools/fuzzing.py $(or $(ARGS),--seconds 60)

.PHONY: docs
docs: ## build the documentation into site/
	@tools/bootstrap check
	@.venv/bin/mkdocs build --strict

.PHONY: stop
stop: ## shut the testbed down; make lab starts it again
	@tools/bootstrap installed
	@$(PLAYBOOK) playbooks/stop.yml $(ARGS)

.PHONY: reset
reset: ## the testbed on fresh disks
	@tools/bootstrap installed
	@$(PLAYBOOK) playbooks/reset.yml $(ARGS)

.PHONY: teardown
teardown: ## remove the testbed; only the cache stays
	@tools/bootstrap installed
	@$(PLAYBOOK) playbooks/teardown.yml $(ARGS)

.PHONY: lock
lock: ## resolve requirements.in anew into requirements.txt
	@/usr/bin/python3 -m venv --clear .cache/lock-venv
	@.cache/lock-venv/bin/pip install --quiet -r requirements.in
	@{ echo '# Pinned by `make lock` from requirements.in: do not edit.'; .cache/lock-venv/bin/pip freeze; } >requirements.txt
	@rm -rf .cache/lock-venv
