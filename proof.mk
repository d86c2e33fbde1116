# What only the repository of the library has: its proof on real systemds, the experiment, and `make new`.
#
# make fuzz TIME=1m   looks for bytes from outside that break it; make corpus keeps what it has learnt
# make model          tries every order in which the registry's tasks can meet
# make soak TIME=10m  verbs and faults at random, under clients that never retry, on each systemd
# make bench          the experiment: restarts under load, beside other servers
# make new NAME=shop DIR=../shop
#                     a repository for a service of your own

# The systemds that the proof boots besides this machine's.
ROOTS := target/systemd-257 target/systemd-252 target/systemd-unstable

# What the proof runs besides cargo, and the Debian packages that it comes in.
PYTHON := grpc h2 httpx
TOOLS := curl h2load inotifywait java lintian mmdebstrap openssl prlimit start_server systemctl systemd-nspawn systemd-socket-activate \
	/usr/lib/postgresql/*/bin/postgres /usr/lib/*/libnss_systemd.so.2 /usr/lib/*/faketime/libfaketimeMT.so.1 \
	$(PYTHON:%=/usr/lib/python3/dist-packages/%)
DEBIAN := ca-certificates curl inotify-tools libfaketime libnss-systemd libserver-starter-perl lintian mmdebstrap nghttp2-client \
	openjdk-17-jdk-headless openssl postgresql python3-grpcio python3-h2 python3-httpx systemd systemd-container util-linux
# Nobody needs the database server that Debian would set up and start.
NO_CLUSTER := mkdir -p $$root/etc/postgresql-common && \
	echo create_main_cluster = false >>$$root/etc/postgresql-common/createcluster.conf
INSTALL := $(NO_CLUSTER) && apt-get update && apt-get install --yes --no-install-recommends $(DEBIAN)

# As root, all of it: every file of tests, so that none is forgotten; most of them wait for something, and what takes the
# whole machine has a lock of its own. As somebody else, what can be done without, and a word on what cannot.
# Always of all packages: for one by itself, what it depends on would be built anew.
ifeq ($(shell id -u),0)
test: proof
test: TESTED := --workspace --lib --bins --test '*' -- --test-threads 6
else
test: no-proof
test: TESTED := --workspace --lib --bins --test examples --test service
endif

.PHONY: examples
examples:
	cargo build --workspace --examples
	cargo test --workspace --doc

# What it runs besides is brought side by side: most of that waits for the network.
.PHONY: proof brought
proof: examples tools
	$(MAKE) --no-print-directory --jobs 4 brought
	$(MAKE) --no-print-directory model
brought: systemfd cargo-deb cargo-generate-rpm $(ROOTS) target/tools/bin/go-client

.PHONY: no-proof
no-proof: examples
	@echo 'Left out: the proof on real systemds. As root: sudo -E env "PATH=$$PATH" make test'

# The compiler, with flags of its own for the library's unit tests alone: what they depend on is built without.
WITH := target/rustc-with
RUSTC_WITH = WITH='$(1)' RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/$(WITH)
$(WITH): proof.mk
	@mkdir -p target
	@printf '#!/bin/sh\ncase "$$*" in *"--crate-name outlive "*" --test "*) set -- "$$@" $$WITH;; esac\nexec "$$@"\n' >$@
	@chmod +x $@

# Every parser of what comes from outside, and the model of HTTP/2, for TIME each: `make test` gives each of them a
# second, and what is known by now (__fuzz__ beside the sources). What is found is kept in target/fuzz/found, with the
# log that tells of it. On stable Rust: libFuzzer needs the compiler's coverage, and no sanitizer where the code has no
# `unsafe`.
TIME := 1m
SECONDS = $(subst s,,$(subst h,*3600,$(subst m,*60,$(TIME))))
COVERAGE := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
.PHONY: fuzz corpus
fuzz: fuzzers
	@$(EACH_FUZZER) tests/fuzz.sh look $$(($(SECONDS))) $$binary
corpus: fuzzers
	@$(EACH_FUZZER) tests/fuzz.sh keep - $$binary
# By its name and the folder of what is known to it, as many at once as there are cores.
EACH_FUZZER = binary=$$(ls -t target/fuzz/$(TRIPLE)/fuzz/deps/outlive-* | grep -v '\.d$$' | head -1); \
	CARGO_BOLERO_SELECT=all $$binary --nocapture 2>/dev/null \
	| sed -n 's:.*"work_dir"\:"\([^"]*\)".*"test_name"\:"\([^"]*\)".*:\2 \1/corpus:p' | xargs -P $$(nproc) -L 1
.PHONY: fuzzers
fuzzers: $(WITH)
	$(call RUSTC_WITH,$(COVERAGE)) RUSTFLAGS='--cfg fuzzing --cfg fuzzing_libfuzzer' BOLERO_FUZZER=libfuzzer cargo test --quiet \
		--package outlive --lib --profile fuzz --target $(TRIPLE) --target-dir target/fuzz --no-run

# The registry's own code, with loom's atomics.
.PHONY: model
model: $(WITH)
	@binary=$$($(call RUSTC_WITH,--cfg model) cargo test --quiet --workspace --lib --no-run --message-format=json \
		| sed -n 's/.*"name":"outlive".*"executable":"\([^"]*\)".*/\1/p') && $$binary --quiet registry::models

# SEED=… draws again what was drawn.
SEED :=
.PHONY: soak
soak: TIME := 10m
soak: root tools target/systemd-257 target/systemd-252 $(BINARY)
	cargo bench --features jemalloc --bench soak -- --time $(TIME) $(if $(SEED),--seed $(SEED))

# Binaries that show by what they lack what it costs: `LEFT_OUT` of outlive/src/requests.rs.
WITHOUT := $(addprefix target/bench/without-,ids metrics limits spans all)
$(WITHOUT): target/bench/without-%: $(shell find outlive/src src -name '*.rs') Cargo.lock
	OUTLIVE_LEAVES_OUT=$* cargo build --quiet --release --features jemalloc --target-dir target/bench/build
	cp target/bench/build/release/$(PACKAGE) $@

# Restarts under load, beside other servers; BENCH=--quick takes three minutes.
.PHONY: bench bench-readme
bench: root tools target/systemd-252 cargo-deb $(if $(filter --quick,$(BENCH)),,$(WITHOUT))
	cargo build --release --features jemalloc --example bare
	cargo bench --features jemalloc --bench experiment -- $(BENCH)
bench-readme:
	$(MAKE) bench BENCH=--readme

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo 'It boots a real systemd, as root: sudo -E env "PATH=$$PATH" make bench'; exit 1; }

.PHONY: tools
tools:
	@for tool in $(TOOLS); do [ -e $$tool ] || command -v $$tool >/dev/null && continue; \
	[ "$$(id -u)" = 0 ] || { echo "$$tool is missing; as root: apt-get install $(DEBIAN)"; exit 1; }; \
	$(INSTALL); exit; done
check-units: | tools

# Other systemds to test on, besides this machine's: those of both stable Debians, to install packages on too, and the
# newest, of Debian unstable. A root is made anew when what it consists of is changed here; unstable's, which moves
# every day, also after `rm -r target/systemd-unstable`.
SYSTEM := systemd,systemd-sysv,dbus,libnss-systemd,libpam-systemd,needrestart
# Programs that talk to the service, as Debian packages them: tests/proof/peers.rs.
PEERS := apache2-bin,caddy,chromium-headless-shell,haproxy,nginx,nodejs,varnish
target/systemd-257: RELEASE := trixie
target/systemd-257: INCLUDED := $(SYSTEM),postgresql,$(PEERS)
target/systemd-252: RELEASE := bookworm
target/systemd-252: INCLUDED := $(SYSTEM),rpm
target/systemd-unstable: RELEASE := sid
target/systemd-unstable: INCLUDED := $(SYSTEM)
# A mirror that is behind will do: an old list of unstable's packages is refused by default.
target/systemd-unstable: APT := --aptopt='Acquire::Check-Valid-Until "false"'
$(ROOTS): %: %.list | tools
	rm -rf $@.part
	mmdebstrap --quiet --variant=minbase $(APT) --include=$(INCLUDED) --essential-hook='root=$$1; $(NO_CLUSTER)' $(RELEASE) $@.part
	rm -rf $@
	mv $@.part $@
	touch $@
# What a root consists of, written only when it has changed.
$(ROOTS:=.list): unconditionally
	@mkdir -p target
	@echo '$(RELEASE) $(INCLUDED)' | cmp --silent - $@ || echo '$(RELEASE) $(INCLUDED)' >$@
.PHONY: unconditionally

# A client in Go, by Debian 13's compiler: that of Debian 12 is from before Go 1.20, which goes on using a table of
# headers that it has promised not to use.
GO = $(CURDIR)/target/go/usr/lib/go-1.24
target/tools/bin/go-client: tests/proof/clients/main.go | tools
	[ -e $(GO) ] || { rm -rf target/go && mmdebstrap --quiet --variant=extract --include=golang-1.24-go trixie target/go; }
	HOME=$(CURDIR)/target/go GOROOT=$(GO) GOTOOLCHAIN=local CGO_ENABLED=0 $(GO)/bin/go build -o $@ $<

check: check-dependencies check-docs
.PHONY: check-dependencies
check-dependencies:
	command -v cargo-deny >/dev/null || $(INSTALL_TOOL) cargo-deny
	cargo deny check bans licenses sources
# The library by itself, with none of its features.
.PHONY: check-docs
check-docs:
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps -p outlive
	cargo clippy --quiet -p outlive -- -D warnings

# Needs the network: the database of advisories is fetched.
.PHONY: audit
audit:
	cargo deny check advisories

# What a copy has of this repository, and the README and continuous integration of its own.
COPIED := .gitignore LICENSE SECURITY.md Makefile rustfmt.toml src systemd packaging tests/service.rs tests/systemd.rs outlive
.PHONY: new
new:
	@echo '$(NAME)' | grep -qx '[a-z][a-z0-9-]*' || { echo 'NAME=shop: of a-z, 0-9 and -'; exit 1; }
	@[ -n '$(DIR)' ] && [ ! -e '$(DIR)' ] || { echo 'DIR=../shop: a folder that is not there yet'; exit 1; }
	mkdir -p '$(DIR)'
	tar --create --exclude=target $(COPIED) | tar --extract --directory='$(DIR)'
	tar --create --directory=template . | tar --extract --directory='$(DIR)'
	sed '/^# >>/,/^# <</d' Cargo.toml >'$(DIR)/Cargo.toml'
	cp Cargo.lock '$(DIR)/Cargo.lock'
	mv '$(DIR)/packaging/local.$(PACKAGE).conf' '$(DIR)/packaging/local.$(NAME).conf'
	cd '$(DIR)/systemd' && for unit in $(PACKAGE)*; do mv "$$unit" "$(NAME)$${unit#$(PACKAGE)}"; done
	cd '$(DIR)' && perl -pi -e 's/\b$(PACKAGE)\b(?!\.rs|::|;)/$(NAME)/g; s/\b$(VARIABLE)_/$(shell echo '$(NAME)' | tr a-z- A-Z_)_/g' \
		Cargo.toml Cargo.lock README.md $$(find systemd packaging -type f)
	cd '$(DIR)' && cargo update --quiet --workspace --offline
