# make run            build, and serve on 127.0.0.1:8080
# make dev            the same, built and started again at each change of the sources
# make test           all tests; they boot real systemds, as root
# make bench          the experiment: restarts under load, beside other servers
# make check          formatting, lints, dependencies, units
# make new NAME=shop DIR=../shop
# make static         a binary that needs nothing beside it, for a container: target/static/$(PACKAGE)
# make install        then: systemctl enable --now $(PACKAGE).socket

PACKAGE := $(shell sed -n '/^name = /{s/.*"\(.*\)"/\1/p;q}' Cargo.toml)
PREFIX ?= /usr/local
DESTDIR ?=
BINARY ?= target/release/$(PACKAGE)
UNITS := $(wildcard systemd/$(PACKAGE)*.service systemd/$(PACKAGE)*.socket)
# Of the machine that is installed to: some lines are for newer ones only.
SYSTEMD ?= $(shell systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
DROPINS := $(shell [ "$(SYSTEMD)" -ge 254 ] 2>/dev/null && echo $(wildcard systemd/$(PACKAGE).service.d/*.conf))
TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
UNITDIR = $(DESTDIR)$(PREFIX)/lib/systemd/system

.PHONY: run
run:
	cargo run --release

# The socket stays open all the while: what comes during a build, or is refused by the compiler, waits.
DEV := 127.0.0.1:8080
.PHONY: dev
dev: systemfd
	@command -v inotifywait >/dev/null || { echo 'inotifywait is missing: apt-get install inotify-tools'; exit 1; }
	$(call VARIABLE,$(PACKAGE))_DRAIN_TIMEOUT=1s systemfd --no-pid --backlog 4096 --socket http::$(DEV) -- sh -c '\
		while :; do \
			inotifywait --quiet --recursive --event close_write,move,delete src Cargo.toml & changed=$$!; \
			cargo build && { [ -z "$$pid" ] || kill $$pid; "$${CARGO_TARGET_DIR:-target}/debug/$(PACKAGE)" & pid=$$!; }; \
			wait $$changed || exit; \
		done'

.PHONY: systemfd
systemfd:
	@command -v systemfd >/dev/null || cargo install --quiet --locked --debug --root target/tools systemfd

.PHONY: static
static:
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target $(TRIPLE)
	install -D -t target/static $${CARGO_TARGET_DIR:-target}/$(TRIPLE)/release/$(PACKAGE)

# Also when a source is newer, so that what is installed is what was written.
target/release/$(PACKAGE): Cargo.toml Cargo.lock $(shell find src -name '*.rs')
	cargo build --release

.PHONY: install
install: $(BINARY)
	install -D -t $(DESTDIR)$(PREFIX)/bin $(BINARY)
	install -D -m 644 -t $(UNITDIR) $(UNITS)
	$(if $(DROPINS),install -D -m 644 -t $(UNITDIR)/$(PACKAGE).service.d $(DROPINS))

.PHONY: uninstall
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/$(PACKAGE) $(addprefix $(UNITDIR)/,$(notdir $(UNITS)))
	rm -rf $(UNITDIR)/$(PACKAGE).service.d

# ---- tests and checks ----

# What they run besides cargo, and the Debian packages that it comes in.
TOOLS := curl h2load inotifywait mmdebstrap openssl prlimit start_server systemctl systemd-nspawn systemd-socket-activate
DEBIAN := ca-certificates curl inotify-tools libserver-starter-perl mmdebstrap nghttp2-client openssl systemd \
	systemd-container util-linux
INSTALL := apt-get update && apt-get install --yes --no-install-recommends $(DEBIAN)
export PATH := $(PATH):$(CURDIR)/target/tools/bin

.PHONY: test
test: root tools systemfd target/systemd-257
	cargo test --workspace

# Restarts under load, beside other servers; BENCH=--quick takes a minute.
.PHONY: bench bench-readme
bench: root tools
	cargo build --release --example bare
	cargo bench --bench experiment -- $(BENCH)
bench-readme:
	$(MAKE) bench BENCH=--readme

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo 'Tests boot a real systemd, as root: sudo -E env "PATH=$$PATH" make test'; exit 1; }

.PHONY: tools
tools:
	@for tool in $(TOOLS); do command -v $$tool >/dev/null && continue; \
	[ "$$(id -u)" = 0 ] || { echo "$$tool is missing; as root: $(INSTALL)"; exit 1; }; \
	$(INSTALL); exit; done

# Another systemd to test on, besides this machine's.
target/systemd-257: | tools
	rm -rf $@.part
	mkdir -p target
	mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus trixie $@.part
	mv $@.part $@

.PHONY: check
check: check-units
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	command -v cargo-deny >/dev/null || cargo install --quiet --locked --debug --root target/tools cargo-deny
	cargo deny check bans licenses sources

# Needs the network: the database of advisories is fetched.
.PHONY: audit
audit:
	cargo deny check advisories

# `verify` looks for the binary, which is not installed here; whatever it says is a fault.
.PHONY: check-units
check-units: | tools
	rm -rf target/units
	mkdir -p target/units
	cp $(UNITS) target/units
	$(if $(DROPINS),install -D -t target/units/$(PACKAGE).service.d $(DROPINS))
	sed -i 's:^\(Exec[A-Za-z]*\)=%N:\1=/bin/true:' target/units/*.service
	! systemd-analyze verify target/units/*.service target/units/*.socket 2>&1 | grep .
	systemd-analyze security --offline=true --threshold=5 --no-pager target/units/$(PACKAGE).service >/dev/null

# ---- a service of your own ----

VARIABLE = $(shell echo '$(1)' | tr a-z- A-Z_)

.PHONY: new
new:
	@echo '$(NAME)' | grep -qx '[a-z][a-z0-9-]*' || { echo 'NAME=shop: of a-z, 0-9 and -'; exit 1; }
	@[ -n '$(DIR)' ] && [ ! -e '$(DIR)' ] || { echo 'DIR=../shop: a folder that is not there yet'; exit 1; }
	mkdir -p '$(DIR)'
	tar --create --exclude=./target --exclude=./.git . | tar --extract --directory='$(DIR)'
	cd '$(DIR)/systemd' && for unit in $(PACKAGE)*; do mv "$$unit" "$(NAME)$${unit#$(PACKAGE)}"; done
	cd '$(DIR)' && perl -pi -e 's/\b$(PACKAGE)\b(?!\.rs|::)/$(NAME)/g; s/\b$(call VARIABLE,$(PACKAGE))_/$(call VARIABLE,$(NAME))_/g' \
		Cargo.toml Cargo.lock README.md systemd/*
