# Commands that only the repository of the library has. `make new` does not copy this file.
#
## make e2e             as root: all tests on real systemds and with other programs; PART=NAME runs one part
## make e2e-deps        as root: install and fetch what make e2e, soak and bench need
## make fuzz TIME=1m    run each fuzz target under libFuzzer; make corpus minimizes the corpora
## make models          test the registry of connections in every possible interleaving of its tasks, with loom
## make soak TIME=10m   as root: random restarts, reloads and faults under load; SEED=N repeats a run
## make bench           as root: compare with other servers; BENCH=--quick takes three minutes
## make docs            build docs/ as a website in target/docs/site (needs mdbook; installs it with cargo)
## make audit           report known vulnerabilities of the dependencies (needs the network)
## make new NAME=shop DIR=../shop  make a new repository for a service of that name; DIR=. makes it of this clone;
##                      EXAMPLE=board begins with the service of e2e/board

# ---- make test, make check ----

# Runs after the tests of the workspace, because those are faster and so report an error sooner.
.PHONY: test-process
test: test-process
# Most of these tests wait for something, so many of them run at the same time.
test-process: test-workspace
	cd e2e && cargo test --package e2e-process -- --test-threads 8

# Checks the library also without its features, and with the fuzz targets.
.PHONY: check-e2e check-e2e-dependencies
check: check-e2e check-e2e-dependencies
check-e2e:
	cd e2e && cargo fmt --all --check
	cd e2e && cargo clippy --workspace --all-targets -- -D warnings
	cd e2e && cargo clippy --workspace --test '*' -- -D warnings
	cargo clippy -p outlive -- -D warnings
	cargo clippy --workspace --lib --tests --features outlive/fuzz-tests,outlive/cpu-profile,outlive/heap-profile,outlive/log-control,outlive/otlp,outlive/span-filter -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps -p outlive
check-e2e-dependencies:
	@$(call WITH_TOOL,cargo-deny,cd e2e && cargo deny --config ../deny.toml check bans licenses sources)

# The schemas are in the Python package, one for each version of Kubernetes.
MANIFESTS := docs/recipes/kubernetes.yaml
.PHONY: check-manifests
check: check-manifests
check-manifests:
	@$(call WITH_TOOL,kubernetes-validate,kubernetes-validate --strict --quiet $(MANIFESTS))
KUBERNETES_VALIDATE := target/tools/bin/kubernetes-validate
$(KUBERNETES_VALIDATE):
	python3 -m venv target/tools/kubernetes
	target/tools/kubernetes/bin/pip install --quiet kubernetes-validate==1.37.0
	mkdir -p $(@D)
	ln -sf ../kubernetes/bin/kubernetes-validate $@

.PHONY: audit
audit:
	cargo deny check advisories

# ---- make e2e ----

.PHONY: e2e
e2e: root e2e-tools
	@e2e/run '$(PART)'

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo 'It boots real systemds, as root: sudo -E env "PATH=$$PATH" make $(MAKECMDGOALS)'; exit 1; }

# The systemds that are tested besides this machine's: those of both stable Debians, on which packages are installed
# too, and the newest, of Debian unstable.
ROOTS := target/systemd-257 target/systemd-252 target/systemd-unstable
# Programs that the tests run, and the Debian packages that contain them.
TOOLS := curl h2load inotifywait java lintian mmdebstrap openssl prlimit script start_server systemctl systemd-nspawn \
	systemd-socket-activate valgrind /usr/lib/python3.*/ensurepip /usr/lib/postgresql/*/bin/postgres /usr/lib/*/libnss_systemd.so.2 \
	/usr/lib/*/faketime/libfaketimeMT.so.1 $(addprefix /usr/lib/python3/dist-packages/,grpc h2 httpx websockets)
DEBIAN := bsdutils ca-certificates curl inotify-tools libfaketime libnss-systemd libserver-starter-perl lintian mmdebstrap \
	nghttp2-client openjdk-17-jdk-headless openssl postgresql python3-grpcio python3-h2 python3-httpx python3-venv python3-websockets \
	systemd systemd-container util-linux valgrind
CARGO_TOOLS := cargo-auditable cargo-deb cargo-deny cargo-generate-rpm
GO_VERSIONS := go-1.19 go-1.24
GO_CLIENTS := $(GO_VERSIONS:%=target/tools/bin/%-client)
PPROF := target/tools/bin/pprof

# A shell command that prints each of $(TOOLS) that is missing.
MISSING_TOOLS = for tool in $(TOOLS); do [ -e $$tool ] || command -v $$tool >/dev/null || echo $$tool; done

# Names everything that is missing at once, and installs nothing.
.PHONY: e2e-tools
e2e-tools:
	@missing=$$($(MISSING_TOOLS); for tool in $(filter-out cargo-deny,$(CARGO_TOOLS)); do command -v $$tool >/dev/null || echo $$tool; done; \
		for made in $(ROOTS) $(GO_CLIENTS) $(PPROF); do [ -e $$made ] || echo $$made; done); \
	[ -z "$$missing" ] || { echo "Missing, and installed by make e2e-deps (as root):" $$missing; exit 1; }

# Debian starts a database server when postgresql is installed, unless this file says otherwise.
NO_CLUSTER = mkdir -p $(1)/etc/postgresql-common && \
	echo create_main_cluster = false >>$(1)/etc/postgresql-common/createcluster.conf

.PHONY: e2e-deps
e2e-deps: root
	@[ -z "$$($(MISSING_TOOLS))" ] || { \
		echo 'Installing Debian packages: $(DEBIAN)'; \
		echo 'Writing create_main_cluster = false to /etc/postgresql-common/createcluster.conf, so that no database server starts'; \
		$(call NO_CLUSTER,) && apt-get update && apt-get install --yes --no-install-recommends $(DEBIAN); }
	@echo 'Building or fetching into target/, where missing: $(CARGO_TOOLS) $(ROOTS) $(GO_CLIENTS) $(PPROF) $(KUBERNETES_VALIDATE)'
	@$(MAKE) --no-print-directory --jobs 4 $(CARGO_TOOLS) $(ROOTS) $(GO_CLIENTS) $(PPROF) $(KUBERNETES_VALIDATE)
	cargo fetch --quiet # all platforms, because cargo-deny looks at each, also in the copies of tests, which have no network
	cd e2e && cargo fetch --quiet

.PHONY: cargo-deny
cargo-deny:
	@command -v $@ >/dev/null || $(INSTALL_TOOL) $@

# A root is made again when its contents are changed here; that of unstable, which moves every day, also after
# `rm -r target/systemd-unstable`.
SYSTEM := systemd,systemd-sysv,dbus,libnss-systemd,libpam-systemd,needrestart
# Debian's clients and proxies, with which e2e/systemd/tests/systemd/peers.rs tests the service.
PEERS := apache2-bin,caddy,chromium-headless-shell,haproxy,nginx,node-ws,nodejs,varnish
target/systemd-257: RELEASE := trixie
target/systemd-257: INCLUDED := $(SYSTEM),postgresql,$(PEERS)
target/systemd-252: RELEASE := bookworm
target/systemd-252: INCLUDED := $(SYSTEM),rpm
target/systemd-unstable: RELEASE := sid
target/systemd-unstable: INCLUDED := $(SYSTEM)
# By default apt refuses a package list of unstable that is a few days old, which a mirror that lags behind has.
target/systemd-unstable: APT := --aptopt='Acquire::Check-Valid-Until "false"'
$(ROOTS): %: %.list
	rm -rf $@.part
	mmdebstrap --quiet --variant=minbase $(APT) --include=$(INCLUDED) --essential-hook='$(call NO_CLUSTER,$$1)' $(RELEASE) $@.part
	rm -rf $@
	mv $@.part $@
	touch $@
# The contents of a root. The file is written only when they have changed, so that make builds the root again only then.
$(ROOTS:=.list): unconditionally
	@mkdir -p target
	@echo '$(RELEASE) $(INCLUDED)' | cmp --silent - $@ || echo '$(RELEASE) $(INCLUDED)' >$@
.PHONY: unconditionally

# Debian 12 and 13 have these compilers. Before Go 1.20, net/http ignores the header table size that the server announces.
GO_OF_go-1.19 := bookworm
GO_OF_go-1.24 := trixie
GO = target/$(1)/usr/lib/$(1)
$(GO_VERSIONS:%=target/%/installed): target/%/installed:
	rm -rf $(@D)
	mmdebstrap --quiet --variant=extract --include=$(*:go-%=golang-%-go) $(GO_OF_$*) $(@D)
	touch $@
$(GO_CLIENTS): target/tools/bin/%-client: e2e/systemd/clients/main.go | target/%/installed
	HOME=$(CURDIR)/target/$* GOROOT=$(CURDIR)/$(call GO,$*) GOTOOLCHAIN=local CGO_ENABLED=0 $(call GO,$*)/bin/go build -o $@ $<

# Go's tool for profiles, with which e2e/systemd/tests/profiles.rs reads them.
$(PPROF): | target/go-1.24/installed
	install $(call GO,go-1.24)/pkg/tool/linux_*/pprof $@

# ---- fuzzing ----

# `make e2e PART=features` runs each target on its corpus (e2e/fuzz/corpus) and for a second; this runs each for TIME, as
# many at once as there are cores. Inputs that make one fail are kept in target/fuzz/artifacts, with the log. libFuzzer
# needs the compiler's coverage, which stable Rust has; a sanitizer is not needed where the code has no `unsafe`.
TIME := 1m
SECONDS = $(subst s,,$(subst h,*3600,$(subst m,*60,$(TIME))))
COVERAGE := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
.PHONY: fuzz corpus
fuzz: fuzzers
	@$(EACH_FUZZER) e2e/fuzz/fuzz.sh run $$(($(SECONDS))) $$binary
corpus: fuzzers
	@$(EACH_FUZZER) e2e/fuzz/fuzz.sh minimize - $$binary
# Runs the command that follows with the name of each test and of its corpus as arguments.
EACH_FUZZER = binary=$$(ls -t target/fuzz/$(TRIPLE)/fuzz/deps/outlive-* | grep -v '\.d$$' | head -1); \
	CARGO_BOLERO_SELECT=all $$binary --nocapture 2>/dev/null \
	| sed -n 's:.*"work_dir"\:"[^"]*/\([^"/]*\)".*"test_name"\:"\([^"]*\)".*:\2 \1:p' | xargs -P $$(nproc) -L 1
.PHONY: fuzzers
fuzzers:
	RUSTFLAGS='--cfg fuzzing --cfg fuzzing_libfuzzer $(COVERAGE)' BOLERO_FUZZER=libfuzzer cargo test --quiet --package outlive \
		--lib --features fuzz-tests --config e2e/fuzz/profile.toml --profile fuzz --target $(TRIPLE) --target-dir target/fuzz --no-run

# loom runs the code of the registry in every possible interleaving of its tasks.
.PHONY: models
models:
	cargo test --workspace --lib --features outlive/model-tests -- models::

# ---- soak and comparison ----

SEED :=
.PHONY: soak
soak: TIME := 10m
soak: root e2e-tools $(BINARY)
	cd e2e && cargo run --release --package soak -- --time $(TIME) $(if $(SEED),--seed $(SEED))

.PHONY: bench bench-readme
bench: root e2e-tools $(BINARY)
	cd e2e && cargo build --release --package bench
	target/release/comparison $(BENCH)
bench-readme:
	$(MAKE) bench BENCH=--readme

# ---- make new ----

.PHONY: new
new:
	@e2e/new '$(PACKAGE)' '$(NAME)' '$(DIR)' '$(EXAMPLE)'

# ---- make docs ----

# Without the features for a server of its own and for watching files.
.PHONY: docs mdbook
docs: mdbook
	@docs/site
mdbook:
	@command -v $@ >/dev/null || $(INSTALL_TOOL) $@ --no-default-features --features search
