# make run            build, and serve on 127.0.0.1:8080
# make dev            the same, built and started again at each change of the sources
# make test           the tests that need no root and no network
# make test-systemd   the service on a real systemd, in a container, as root
# make check          formatting, lints, units
# make deb, make rpm  a package, whose upgrade is a takeover: target/packages/*.deb, *.rpm
# make static         a binary that needs nothing beside it, for a container: target/static/$(PACKAGE)
# make install        then: systemctl enable --now $(PACKAGE).socket
# make install-user   for one user, without root: systemctl --user enable --now $(PACKAGE).socket
# make update FROM=.. takes a newer library over: a folder or a git URL of its repository

PACKAGE := $(shell sed -n '/^name = /{s/.*"\(.*\)"/\1/p;q}' Cargo.toml)
PREFIX ?= /usr/local
DESTDIR ?=
TARGET ?= target
BINARY ?= $(TARGET)/production/$(PACKAGE)
UNITS := $(wildcard systemd/$(PACKAGE)*.service systemd/$(PACKAGE)*.socket)
# Of the machine that is installed to: some lines are for newer ones only.
SYSTEMD ?= $(shell systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
TOO_NEW := $(if $(shell [ "$(SYSTEMD)" -ge 254 ] 2>/dev/null && echo yes),,%/backoff.conf)
DROPINS := $(filter-out $(TOO_NEW),$(wildcard systemd/$(PACKAGE).service.d/*.conf))
# Without the feature log-control (packages.mk) nothing takes the D-Bus name that the drop-in announces.
INSTALLED_DROPINS = $(if $(LOG_CONTROL),$(DROPINS),$(filter-out %/log-control.conf,$(DROPINS)))
TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
UNITDIR = $(DESTDIR)$(PREFIX)/lib/systemd/system
INSTALL_TOOL := CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root target/tools
export PATH := $(PATH):$(CURDIR)/target/tools/bin

.PHONY: run
run:
	cargo run --release

# The socket stays open all the while: what comes during a build, or is refused by the compiler, waits.
DEV := 127.0.0.1:8080
.PHONY: dev
dev: systemfd
	@command -v inotifywait >/dev/null || { echo 'inotifywait is missing: apt-get install inotify-tools'; exit 1; }
	$(VARIABLE)_DRAIN_TIMEOUT=1s systemfd --no-pid --backlog 4096 --socket http::$(DEV) -- sh -c '\
		while :; do \
			inotifywait --quiet --recursive --event close_write,move,delete src Cargo.toml & changed=$$!; \
			cargo build && { [ -z "$$pid" ] || kill $$pid; "$${CARGO_TARGET_DIR:-target}/debug/$(PACKAGE)" & pid=$$!; }; \
			wait $$changed || exit; \
		done'
VARIABLE = $(shell echo '$(PACKAGE)' | tr a-z- A-Z_)

.PHONY: systemfd
systemfd:
	@command -v systemfd >/dev/null || $(INSTALL_TOOL) systemfd

.PHONY: static
static:
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --features jemalloc --target $(TRIPLE)
	install -D -t target/static $${CARGO_TARGET_DIR:-target}/$(TRIPLE)/release/$(PACKAGE)

# Also when a source is newer, so that what is installed is what was written. A copy, because `make run` builds a binary
# without jemalloc in the place where cargo puts this one.
$(TARGET)/production/$(PACKAGE): Cargo.toml $(wildcard Cargo.lock) $(shell find src $(wildcard outlive/src) -name '*.rs')
	cargo build --release --features jemalloc
	install -D -t $(@D) $(TARGET)/release/$(PACKAGE)

.PHONY: install
install: $(BINARY)
	install -D $(BINARY) $(DESTDIR)$(PREFIX)/bin/$(PACKAGE)
	install -D -m 644 -t $(UNITDIR) $(UNITS)
	$(if $(INSTALLED_DROPINS),install -D -m 644 -t $(UNITDIR)/$(PACKAGE).service.d $(INSTALLED_DROPINS))

# With the lines of systemd/user.conf for what a user's systemd may not do.
USERDIR = $(or $(XDG_CONFIG_HOME),$(HOME)/.config)/systemd/user
.PHONY: install-user
install-user: $(BINARY)
	install -D $(BINARY) $(HOME)/.local/bin/$(PACKAGE)
	install -D -m 644 -t $(USERDIR) $(UNITS)
	install -D -m 644 -t $(USERDIR)/$(PACKAGE).service.d $(INSTALLED_DROPINS) systemd/user.conf

.PHONY: uninstall
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/$(PACKAGE) $(addprefix $(UNITDIR)/,$(notdir $(UNITS)))
	rm -rf $(UNITDIR)/$(PACKAGE).service.d

.PHONY: test
test:
	cargo test $(TESTED)

.PHONY: test-systemd
test-systemd:
	@[ "$$(id -u)" = 0 ] || { echo 'It boots a real systemd, as root: sudo -E env "PATH=$$PATH" make $@'; exit 1; }
	@command -v systemd-nspawn >/dev/null || { echo 'systemd-nspawn is missing: apt-get install systemd-container'; exit 1; }
	cargo test --test systemd

.PHONY: check
check: check-units
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --test '*' -- -D warnings # those too that need root

# `verify` looks for the binary, which is not installed here; whatever it says is a fault.
.PHONY: check-units
check-units:
	rm -rf target/units
	mkdir -p target/units
	cp $(UNITS) target/units
	$(if $(DROPINS),install -D -m 644 -t target/units/$(PACKAGE).service.d $(DROPINS))
	sed -i 's:^\(Exec[A-Za-z]*\)=%p:\1=/bin/true:' target/units/*.service
	! systemd-analyze verify target/units/*.service target/units/*.socket 2>&1 | grep .
	systemd-analyze security --offline=true --threshold=5 --no-pager target/units/$(PACKAGE).service >/dev/null

.PHONY: update
update:
	@outlive/update '$(FROM)'

include $(dir $(lastword $(MAKEFILE_LIST)))outlive/packaging/packages.mk
-include proof.mk
