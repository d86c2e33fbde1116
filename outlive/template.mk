# The commands of a service from the template. `make update` replaces this file; PACKAGE is its name in Cargo.toml.
#
## make run             build and serve on 127.0.0.1:8080
## make dev             like make run, and build and reload after each change (needs inotify-tools); DEV=ADDRESS sets the address
## make test            all tests of the workspace; they need no root, no network and no programs besides cargo
## make test-systemd    as root: test the service on a real systemd in a container (needs systemd-container)
## make check           formatting, lints, units, dependencies; without STRICT=1 a check whose tool is missing is skipped
## make deb, make rpm   build a package in target/packages; an upgrade to it reloads the service
## make static          build a statically linked binary in target/static, for containers
## make install         install the binary and the units; then: systemctl enable --now $(PACKAGE).socket
## make install-user    the same for one user, without root; then: systemctl --user enable --now $(PACKAGE).socket
## make uninstall       remove what make install has installed
## make update FROM=PATH|URL  replace outlive/ by a newer library, from its repository

.DEFAULT_GOAL := help
# The prefix of the environment variables.
VARIABLE = $(shell echo '$(PACKAGE)' | tr a-z- A-Z_)
PREFIX ?= /usr/local
DESTDIR ?=
TARGET ?= target
BINARY ?= $(TARGET)/production/$(PACKAGE)
UNITS := $(wildcard systemd/$(PACKAGE)*.service systemd/$(PACKAGE)*.socket)
# The systemd version of the machine that the units are for. Drop-ins that need a newer one are not installed.
SYSTEMD ?= $(shell systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
TOO_NEW := $(if $(shell [ "$(SYSTEMD)" -ge 254 ] 2>/dev/null && echo yes),,%/backoff.conf)
DROPINS := $(filter-out $(TOO_NEW),$(wildcard systemd/$(PACKAGE).service.d/*.conf))
# Without the feature log-control (packages.mk) the binary does not own the D-Bus name that the drop-in announces.
INSTALLED_DROPINS = $(if $(LOG_CONTROL),$(DROPINS),$(filter-out %/log-control.conf,$(DROPINS)))
TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
UNITDIR = $(DESTDIR)$(PREFIX)/lib/systemd/system
INSTALL_TOOL := CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root target/tools
export PATH := $(PATH):$(CURDIR)/target/tools/bin

.PHONY: help
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST) | sed 's/$$(PACKAGE)/$(PACKAGE)/'

.PHONY: run
run:
	cargo run --release

DEV := 127.0.0.1:8080
.PHONY: dev
dev:
	@outlive/dev $(PACKAGE) $(VARIABLE) $(DEV)

# cargo-auditable adds the list of all crates to the binary (SBOM). make deb and make rpm install the tool.
AUDITABLE = $$(command -v cargo-auditable >/dev/null && echo auditable)

.PHONY: static
static:
	MAKEFLAGS= RUSTFLAGS='-C target-feature=+crt-static' cargo $(AUDITABLE) build --release --features jemalloc \
		--target $(TRIPLE)
	install -D -t target/static $${CARGO_TARGET_DIR:-target}/$(TRIPLE)/release/$(PACKAGE)

# Built again if a source is newer, because otherwise an old binary would be installed. Copied, because `make run` builds a
# binary without jemalloc in the place where cargo puts this one. Without MAKEFLAGS, because the make of jemalloc would read
# DESTDIR= there, and install its library into it.
$(TARGET)/production/$(PACKAGE): Cargo.toml $(wildcard Cargo.lock) $(shell find src $(wildcard outlive/src) -type f)
	MAKEFLAGS= cargo $(AUDITABLE) build --release --features jemalloc
	install -D -t $(@D) $(TARGET)/release/$(PACKAGE)

.PHONY: install
install: $(BINARY)
	install -D $(BINARY) $(DESTDIR)$(PREFIX)/bin/$(PACKAGE)
	install -D -m 644 -t $(UNITDIR) $(UNITS)
	$(if $(INSTALLED_DROPINS),install -D -m 644 -t $(UNITDIR)/$(PACKAGE).service.d $(INSTALLED_DROPINS))

# systemd/user.conf resets the lines that the systemd of a user may not apply.
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

.PHONY: test test-workspace
test: test-workspace
test-workspace:
	cargo test --workspace

.PHONY: test-systemd
test-systemd:
	@[ "$$(id -u)" = 0 ] || { echo 'It boots a real systemd, as root: sudo -E env "PATH=$$PATH" make $@'; exit 1; }
	@command -v systemd-nspawn >/dev/null || { echo 'systemd-nspawn is missing: apt-get install systemd-container'; exit 1; }
	cargo test --workspace --test systemd

# The second run of clippy is for tests that `cargo test` leaves out, because they need root.
.PHONY: check
check: check-units check-dependencies
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --test '*' -- -D warnings

# Runs $(2) if there is a tool $(1); names it otherwise, and fails only with STRICT=1.
STRICT :=
WITH_TOOL = if command -v $(1) >/dev/null; then $(2); else echo 'Not checked, because $(1) is missing: $@'$(if $(STRICT),; exit 1); fi

# `verify` looks for the binary, which is not installed here, so the copies of the units start another one.
.PHONY: check-units
check-units:
	rm -rf target/units
	mkdir -p target/units
	cp $(UNITS) target/units
	$(if $(DROPINS),install -D -m 644 -t target/units/$(PACKAGE).service.d $(DROPINS))
	sed -i 's:^\(Exec[A-Za-z]*\)=%p:\1=/bin/true:' target/units/*.service
	@$(call WITH_TOOL,systemd-analyze,! systemd-analyze verify target/units/*.service target/units/*.socket 2>&1 | grep . && \
		systemd-analyze security --offline=true --threshold=5 --no-pager target/units/$(PACKAGE).service >/dev/null)

.PHONY: check-dependencies
check-dependencies:
	@$(call WITH_TOOL,cargo-deny,cargo deny check bans licenses sources)

.PHONY: update
update:
	@outlive/update '$(FROM)'

include $(dir $(lastword $(MAKEFILE_LIST)))packaging/packages.mk
