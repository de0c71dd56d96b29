# SPDX-License-Identifier: Apache-2.0
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help tools apply build python demo test verify export lint rebase status
.PHONY: wheel install-into upstream bench bench-cpu report

PYTHON3 ?= python3
export RELEASE VLLM PYTHON DEVICE CONTINUE ABORT DROP ARGS STAGE TO TO_DIR
export PATCH SINCE FULL JOBS MINUTES PARTIAL
export UNDO BUMP MACHINE ONTO WITH LEVEL RESULTS

RUN := build/tools/bin/python -m scripts

help: ## list the targets
	@echo 'make TARGET [VARIABLE=value ...]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16
	@echo 'VLLM=path      work on that clone of vLLM, not on build/vllm'
	@echo 'RELEASE=tag    another release that pins.toml names'
	@echo 'PYTHON=path    an interpreter that has this vLLM release already'
	@echo 'DEVICE=cpu     the CPU runtime even where there is an NVIDIA GPU (or cuda)'
	@echo 'CONTINUE=1     apply: stop at a patch that does not apply, for git am --continue'
	@echo 'PATCH=0007     verify: only these (3-5, 3-, 1,4); SINCE=revision: only what changed'
	@echo 'FULL=1         verify: every test after every patch; JOBS=n at a time, MINUTES=n'
	@echo '               PARTIAL=1: what MINUTES= leave out is named, but no failure'
	@echo 'TO=tag         rebase, status: the release to go to, or TO_DIR=path of a clone'
	@echo '               rebase: CONTINUE=1 goes on after a conflict, ABORT=1 gives up,'
	@echo '               CONTINUE=1 DROP=1 goes on without the patch that conflicts'
	@echo 'MACHINE=name   wheel: for x86_64 or aarch64; BUMP=1 gives a changed series a number'
	@echo 'ONTO=ref       upstream: another branch than main; WITH="0004" what else it needs'
	@echo 'LEVEL=name     bench: only these (layer, host, tower, scaling, step, serving, agreement, rates); RESULTS=path adds to it'
	@echo 'STAGE=name     test: one of tooling, vllm, cpu, gpu; ARGS="-k name" goes to pytest'

tools:
	@command -v "$(PYTHON3)" >/dev/null || { echo 'error: no $(PYTHON3): install Python 3.11 or newer' >&2; exit 1; }
	@command -v git >/dev/null || { echo 'error: no git: install it' >&2; exit 1; }
	@"$(PYTHON3)" scripts/bootstrap.py

apply: tools ## make a vLLM checkout in build/vllm with one commit a patch
	@$(RUN).apply

build: tools ## make the environment that runs the checkout
	@$(RUN).build

python: tools ## print the path of an interpreter that imports the checkout
	@$(RUN).build --print

demo: tools ## run tiny Gemma4 checkpoints with text, images and video through it
	@$(RUN).apply
	@python=$$($(RUN).build --print) && PYTHONPATH=. "$$python" -m scripts.demo

test: tools ## run all tests: this project's, the patches' and their neighbours
	@$(RUN).test

bench: tools ## measure the release and the patched tree on this GPU
	@$(RUN).bench cuda

bench-cpu: tools ## measure what needs no GPU
	@$(RUN).bench cpu

report: tools ## write docs/benchmarks.md from what was measured, or of RESULTS=
	@"$(PYTHON3)" scripts/bootstrap.py report
	@build/report/bin/python -m scripts.report

verify: tools ## check each patch with only those before it, and its tests without it
	@$(RUN).verify

export: tools ## write the checkout's commits to patches/
	@$(RUN).export

lint: tools ## check scripts/, tests/ and patches/ as vLLM would
	@$(RUN).lint

rebase: tools ## bring the series to another release, TO=
	@$(RUN).rebase

status: tools ## show which patches another release has already
	@$(RUN).status

wheel: tools ## make a wheel of the patched release and print its path
	@$(RUN).wheel

install-into: tools ## put the series in the vLLM that PYTHON= has, or out of it: UNDO=1
	@$(RUN).install

upstream: tools ## make a branch of PATCH=0003 and what it needs on your VLLM= clone's main
	@$(RUN).upstream
