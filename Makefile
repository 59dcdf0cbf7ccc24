# The vocabulary of this project. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test soak bench build image lint fuzz-smoke clean

CARGO ?= cargo

# The storage worker links rclone, so cargo needs the Go that tests/setup fetches; how Go is to
# build, .cargo/config.toml says, and here also: with the backends of src/storage/rclone only.
export PATH := $(CURDIR)/target/go/bin:$(PATH)
export GOFLAGS := -tags=netgo,osusergo -trimpath -overlay=$(CURDIR)/target/rclone-backends.json
# What Go has compiled is kept for other clones, as tests/cache keeps the rest; Go itself removes what is old.
export GOCACHE := $(shell dir=$${XDG_CACHE_HOME:-~/.cache}/openclaw-cvm/go-build; \
	if mkdir -p "$$dir" 2>/dev/null && [ -w "$$dir" ]; then echo "$$dir"; else echo "$(CURDIR)/target/go-cache"; fi)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: ## install what is missing, build, and run the real gateway under the supervisor; Ctrl-C stops it; S3=1: with a bucket
	@tests/setup $(if $(S3),s3,demo)
	@echo "== Building (some minutes the first time)"
	@$(CARGO) build --release --bins
	@tests/demo $(if $(S3),s3)

test: ## install what is missing and run every test
	@rm -f target/phases
	@tests/timed setup tests/setup test
	@tests/timed lints $(MAKE) --no-print-directory lint
	@tests/timed build $(MAKE) --no-print-directory build
	@tests/timed 'fuzz targets' $(MAKE) --no-print-directory fuzz-smoke
	@echo "== Tests"
	@tests/run

soak: ## the same tests with more rounds
	@tests/setup test
	@$(MAKE) --no-print-directory build
	@CVM_SOAK=1 PROPTEST_CASES=20000 tests/run
	@tests/fuzz/run 600

bench: ## measure, beside the peers and, with BESIDE=COMMIT, beside what that commit did; PART=core: a part; writes target/bench/*.json
	@tests/setup bench
	@$(MAKE) --no-print-directory build
	@beside=$(if $(BESIDE),$$(tests/bench/build $(BESIDE))); CVM_BESIDE=$$beside $(CARGO) run --release --config 'profile.release.package.cvm-tests.opt-level=3' --quiet --package cvm-tests --bin cvm-bench $(PART)

# A header that the build of rclone writes last is newer than what cargo compares it with: rclone would
# be built anew by each call of cargo.
BUILT := touch -c -d @0 target/*/release/build/librclone-sys-*/out/librclone.h

build: ## everything, optimized, as it is shipped
	@echo "== Building"
	@$(CARGO) build --release --workspace --bins
	@$(BUILT)

image: ## the image openclaw-cvm:dev, by the docker engine of this machine
	@image/build

lint: ## install the linters and run them: formatting, clippy, shell scripts, spelling, licences and sources of crates
	@tests/setup lint
	@echo "== Lints"
	@$(CARGO) fmt --check
	@tests/lint
	@$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@$(BUILT)

fuzz-smoke: ## each fuzz target for a short while
	@echo "== Fuzz targets, a short run of each"
	@tests/fuzz/run 6

clean: ## remove what was built and installed below target/; what ~/.cache/openclaw-cvm keeps for other clones stays
	rm -rf target
