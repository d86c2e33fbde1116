# make run, make test; make install && systemctl enable --now $(NAME).socket
NAME := $(shell sed -n 's/^name = "\(.*\)"/\1/p;T;q' Cargo.toml)
PREFIX ?= /usr/local
DESTDIR ?=
BINARY ?= target/release/$(NAME)
UNITS := $(wildcard systemd/$(NAME)*)
UNITDIR = $(DESTDIR)$(PREFIX)/lib/systemd/system

.PHONY: run
run:
	cargo run --release

.PHONY: build
build:
	cargo build --release

.PHONY: install
install: $(BINARY)
	install -D -t $(DESTDIR)$(PREFIX)/bin $(BINARY)
	install -D -m 644 -t $(UNITDIR) $(UNITS)

$(BINARY):
	cargo build --release

.PHONY: uninstall
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/$(NAME) $(addprefix $(UNITDIR)/,$(notdir $(UNITS)))

# What the tests run besides cargo, and the Debian packages that it comes in.
TOOLS := systemd-nspawn mmdebstrap systemd-analyze curl
PACKAGES := systemd systemd-container mmdebstrap curl
LINE := apt-get update && apt-get install --yes --no-install-recommends $(PACKAGES)

.PHONY: test
test: test-tools target/systemd-257
	cargo test --workspace

.PHONY: test-tools
test-tools:
	@test "$$(id -u)" = 0 || { echo 'Tests boot a real systemd, as root: sudo -E env "PATH=$$PATH" make test'; exit 1; }
	@command -v $(TOOLS) >/dev/null || { $(LINE); }

# Another systemd to test on, besides this machine's.
target/systemd-257:
	mkdir -p target
	mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus trixie $@.part
	mv $@.part $@
