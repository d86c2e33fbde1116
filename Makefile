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
