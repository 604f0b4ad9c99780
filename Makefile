# Everything starts here: `make` lists the targets. Each installs what it needs first.
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Two at a time, a file by one process: most tests wait more than they work.
TWO    := -n 2 --dist loadfile
GUESTS := tests/peers tests/test_install.py
BUILD  := VHOSTPY_BENCH=1 $(PYTHON) setup.py -q build_ext --inplace

.DEFAULT_GOAL := help
.PHONY: help build demo quick test test-long test-asan test-ceph bench bench-builds bench-peers lint \
	annotate clean distclean

help:           ## lists the targets
	@sed -n 's/^\([a-z-]*\): .*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

build:          ## builds the Cython modules in place, and .venv/bin/vhostpy
	@tests/peers/install.sh build
	@$(call compile,release,)

demo:           ## two real guests on our switch, one with our disk; prints a table
	@tests/peers/install.sh demo
	@$(call compile,release,)
	@$(PYTHON) -m tests.peers.demo

quick:          ## all tests but those with guests; 3 minutes on two cores
	@tests/peers/install.sh test
	@$(call compile,release,)
	@$(PYTEST) $(TWO) -m "not long" $(addprefix --ignore=,$(GUESTS))

test:           ## all tests; 10 minutes on two cores
	@tests/peers/install.sh test
	@$(call compile,release,)
	@$(PYTEST) $(TWO) -m "not long" $(GUESTS)
	@$(PYTEST) -m "not long" $(addprefix --ignore=,$(GUESTS))

test-long:      ## soaks: hundreds of resets, kills and migrations; firmware; QEMU 11
	@tests/peers/install.sh long
	@$(call compile,release,)
	@$(PYTEST) -m long --timeout=3600

test-asan:      ## the tests without guests, with ASan, UBSan and Cython's checks; 20 minutes
	@tests/peers/install.sh test
	@$(call compile,debug,VHOSTPY_DEBUG=1)
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
		$(PYTEST) -m "(not long or sanitized) and not guest" --timeout=900 --ignore=tests/test_install.py

test-ceph:      ## RBD disks on a Ceph of one node, which it starts and ends
	@tests/peers/install.sh ceph
	@$(call compile,release,)
	@$(PYTEST) tests/ceph

bench:          ## start-up time, idle CPU, memory, throughput
	@tests/peers/install.sh build
	@$(call compile,release,)
	@$(PYTEST) bench

bench-builds:   ## two builds in turns: A=main B=HEAD CASE="64B-split null-1"; empty: this tree
	@tests/peers/install.sh build
	@$(call compile,release,)
	@$(PYTHON) -m bench.builds --a "$(A)" --b "$(B)" $(if $(CASE),--case $(CASE))

bench-peers:    ## vhostpy beside testpmd, OVS-DPDK, qemu-storage-daemon, fio; two hours
	@tests/peers/install.sh demo
	@bench/peers/install.sh
	@$(call compile,release,)
	@$(PYTHON) -m bench.peers --resume
	@$(PYTHON) -m bench.peers --readme

lint:           ## ruff, mypy, cython-lint
	@tests/peers/install.sh build
	@$(PYTHON) -m ruff check vhostpy backends vswitch tests bench setup.py
	@$(PYTHON) -m mypy
	@PATH="$$PWD/.venv/bin:$$PATH" cython-lint vhostpy backends vswitch bench

annotate:       ## Cython's HTML beside each module: a hot function is white
	@tests/peers/install.sh build
	@VHOSTPY_ANNOTATE=1 $(BUILD) --force
	@find -L vhostpy bench -name '*.html'

clean:          ## removes what was built
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find vhostpy/ backends vswitch bench tests \( -name '*.c' -o -name '*.so' -o -name '*.html' \) -delete
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -f .venv/.built

distclean: clean ## and .venv and .cache (QEMU 10, the guest kernel) too
	@rm -rf .venv .cache

# $(call compile,MODE,ENVIRONMENT): what is up to date is not compiled again, unless it was for
# another mode. The command is installed once: it runs this tree.
define compile
	if [ "$$(cat .venv/.built 2>/dev/null)" = $(1) ]; then force=; else force=--force; fi; \
	$(2) $(BUILD) $$force && \
	{ [ -x .venv/bin/vhostpy ] || $(PYTHON) -m pip --disable-pip-version-check install \
		--no-build-isolation --no-deps --editable . >.venv/install.log 2>&1 || \
		{ cat .venv/install.log; exit 1; }; } && \
	echo $(1) >.venv/.built
endef
