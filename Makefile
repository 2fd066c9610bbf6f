# One entry point. Each target answers a question; `make help` lists them.
SHELL := /bin/bash
GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.buildVersion=$(VERSION)

# Where there is no home to write to, what Go and the tests keep goes elsewhere.
ifneq ($(shell test -n "$$HOME" && mkdir -p "$$HOME/.cache" 2>/dev/null && test -w "$$HOME/.cache" && echo yes),yes)
export HOME := /var/tmp/wrenn-home
$(shell mkdir -p $(HOME))
endif

.DEFAULT_GOAL := help
.PHONY: help setup tools build demo test unit fuzz e2e model soak bench lint generate clean

help: ## What can I do here?
	@awk -F':.*## ' '/^[a-z0-9]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## What does this machine need? (installs Debian packages, as root)
	@scripts/setup

build: ## Does it compile? (static bin/wrenn and bin/envd)
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/wrenn ./cmd/wrenn
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/envd ./cmd/envd

demo: setup build ## What does it do? (real VMs, the whole life cycle, a table of times)
	@scripts/with-state demo $(GO) run ./test/demo

test: setup build lint unit fuzz e2e ## Does all of it work? (unit tests with -race, fuzzing, then real VMs)

tools: ## What do tests speak to? (builds the S3 server into the Go cache, a minute once)
	@$(GO) -C test/tools/s3server tool -n versitygw >/dev/null

unit: tools ## Do the parts work? (go test -race, no base template needed)
	$(GO) test -race -timeout 40m $$($(GO) list ./... | grep -v /test/)
	$(GO) test -timeout 40m ./snapshot # what takes too long under -race: every crash, 10,000 sequences

fuzz: ## Does garbage harm it? (every fuzz target for FUZZTIME each, default 20000 inputs)
	@scripts/fuzz

e2e: build ## Does the whole work on real VMs?
	@rc=0; \
	scripts/with-state test $(GO) test -count=1 -timeout 120m -v $$($(GO) list ./test/... | grep -v /test/nested) || rc=1; \
	scripts/with-state test $(GO) test -count=1 -timeout 120m -v ./test/nested/... || rc=1; \
	exit $$rc # nested comes alone: starved, the emulated machine does nothing but serve its timer

model: build ## Is anything lost under random faults? (part of e2e; WRENN_MODEL_SEED and WRENN_MODEL_STEPS repeat a run)
	@scripts/with-state test $(GO) test -count=1 -timeout 40m -v -run 'TestModel$$' ./test/model

soak: build ## Does it last? (200 life cycles, 1,000 generations, random faults for WRENN_SOAK, default 30m)
	@WRENN_SOAK=$${WRENN_SOAK:-30m} scripts/with-state test $(GO) test -count=1 -timeout 24h -v ./test/model

bench: setup build ## How fast is it? (ratios and medians, printed with the machine they were measured on)
	@scripts/with-state bench $(GO) run ./test/bench

lint: ## Is it in order? (formatting, vet)
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt would change:"; echo "$$out"; exit 1; }
	$(GO) vet ./...

generate: ## Is the generated code up to date? (needs the network, writes internal/gen)
	$(GO) run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate

clean: ## How do I get rid of what was built? (binaries and the development state)
	rm -rf bin
	@scripts/with-state --clean
