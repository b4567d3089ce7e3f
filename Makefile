# Every command is one line that can be typed by hand as well. Each installs what it needs (scripts/prerequisites).
.DEFAULT_GOAL := help
.PHONY: help deps build guest guest-debian guest-secure ansible agent tools fmt lint check-macos tidy unit doctest doc e2e test demo bench bench-image clean
export PATH := $(PATH):$(CURDIR)/target/tools/bin

help: ## say what there is
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-14s %s\n", $$1, $$2 }'

deps: ## install everything that any command below needs
	scripts/prerequisites build guest test e2e demo

build: ## compile vmpod to target/debug/vmpod
	scripts/prerequisites build && cargo build --workspace --bins --locked

guest: build ## make target/guest/tiny.oci, a guest that boots in seconds
	scripts/prerequisites guest machine && guests/tiny/build

guest-debian: build ## make target/guest/debian.oci, Debian 12 with cloud-init
	scripts/prerequisites guest machine && guests/debian/build

guest-secure: build ## make target/guest/secure.oci, which boots as Windows does: Secure Boot, a TPM
	scripts/prerequisites guest machine && guests/secure/build

ansible: ## make target/guest/ansible.tar, a container that configures guests
	scripts/prerequisites guest && guests/ansible/build

agent: ## make target/guest/agent/job-agent, a CI runner that the tests' guests fetch
	scripts/prerequisites build && guests/agent/build

tools: ## put kubectl and helm into target/tools
	scripts/prerequisites e2e

fmt: ## format the code
	cargo fmt --all

lint: ## formatting, clippy with warnings as errors, and the repository's own checks
	scripts/prerequisites build && cargo fmt --all --check && cargo clippy --workspace --all-targets --locked -- -D warnings && cargo xtask tidy

check-macos: ## types and lints of the whole workspace for macOS on Apple silicon, on any host
	scripts/prerequisites build && scripts/check-macos

tidy: ## check what compilers don't: crate directions, file sizes, links, words
	cargo xtask tidy

unit: ## tests without virtual machines
	scripts/prerequisites build test && cargo nextest run --workspace --locked -E 'not package(e2e)'

doctest: ## the examples in the documentation
	cargo test --workspace --locked --doc

doc: ## build the documentation, warnings are errors
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --locked --no-deps --document-private-items

e2e: guest guest-debian guest-secure ansible agent ## tests with real virtual machines and a real kubectl
	scripts/prerequisites test e2e && cargo nextest run --workspace --locked -E 'package(e2e)'

test: ## all of it: fmt, build with lints, tidy, unit, doctest, doc, guests, e2e
	scripts/test

demo: ## boot a virtual machine as a Pod, talk to it, clean up
	scripts/demo

bench: build guest guest-debian ## pod created to exec answered, against QEMU started by hand; the API against etcd; the agent; the fleet
	scripts/prerequisites e2e bench && cargo xtask bench pod-start && cargo xtask bench api && \
	cargo xtask bench node && cargo xtask bench fleet-burst

bench-image: build guest-debian ## pull, push, delta and clone of a disk image, against skopeo and oras
	scripts/prerequisites e2e && cargo xtask bench image

clean: ## remove everything that was made here
	cargo clean
