# What only the repository of the library has: its proof on real systemds, the experiment, and `make new`.
#
# make bench          the experiment: restarts under load, beside other servers
# make new NAME=shop DIR=../shop
#                     a repository for a service of your own

# What the proof runs besides cargo, and the Debian packages that it comes in.
TOOLS := curl h2load inotifywait mmdebstrap openssl prlimit start_server systemctl systemd-nspawn systemd-socket-activate \
	/usr/lib/postgresql/*/bin/postgres /usr/lib/*/libnss_systemd.so.2
DEBIAN := ca-certificates curl inotify-tools libnss-systemd libserver-starter-perl mmdebstrap nghttp2-client openssl \
	postgresql systemd systemd-container util-linux
# Nobody needs the database server that Debian would set up and start.
NO_CLUSTER := mkdir -p $$root/etc/postgresql-common && \
	echo create_main_cluster = false >>$$root/etc/postgresql-common/createcluster.conf
INSTALL := $(NO_CLUSTER) && apt-get update && apt-get install --yes --no-install-recommends $(DEBIAN)

# As root, all of it; as somebody else, what can be done without, and a word on what cannot.
test: $(if $(filter 0,$(shell id -u)),proof,no-proof)

.PHONY: proof
proof: tools systemfd target/systemd-257
	cargo test -p outlive
	cargo test -p links --test on_systemd
	cargo test --test systemd --test contract --test handover --test takeover --test listeners --test attacks \
		--test server_starter --test containers --test template --test on_systemd

.PHONY: no-proof
no-proof:
	cargo test -p outlive
	@echo 'Left out: the proof on real systemds. As root: sudo -E env "PATH=$$PATH" make test'

# Restarts under load, beside other servers; BENCH=--quick takes a minute.
.PHONY: bench bench-readme
bench: root tools
	cargo build --release --example bare
	cargo bench --bench experiment -- $(BENCH)
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

# Another systemd to test on, besides this machine's.
target/systemd-257: | tools
	rm -rf $@.part
	mkdir -p target
	mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus,libnss-systemd,postgresql \
		--essential-hook='root=$$1; $(NO_CLUSTER)' trixie $@.part
	mv $@.part $@

check: check-dependencies check-docs
.PHONY: check-dependencies
check-dependencies:
	command -v cargo-deny >/dev/null || cargo install --quiet --locked --debug --root target/tools cargo-deny
	cargo deny check bans licenses sources
.PHONY: check-docs
check-docs:
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps -p outlive

# Needs the network: the database of advisories is fetched.
.PHONY: audit
audit:
	cargo deny check advisories

# What a copy has of this repository, and the README and continuous integration of its own.
COPIED := .gitignore LICENSE SECURITY.md Makefile rustfmt.toml src systemd tests/service.rs tests/systemd.rs outlive
.PHONY: new
new:
	@echo '$(NAME)' | grep -qx '[a-z][a-z0-9-]*' || { echo 'NAME=shop: of a-z, 0-9 and -'; exit 1; }
	@[ -n '$(DIR)' ] && [ ! -e '$(DIR)' ] || { echo 'DIR=../shop: a folder that is not there yet'; exit 1; }
	mkdir -p '$(DIR)'
	tar --create --exclude=target $(COPIED) | tar --extract --directory='$(DIR)'
	tar --create --directory=template . | tar --extract --directory='$(DIR)'
	sed '/^# >>/,/^# <</d' Cargo.toml >'$(DIR)/Cargo.toml'
	cp Cargo.lock '$(DIR)/Cargo.lock'
	cd '$(DIR)/systemd' && for unit in $(PACKAGE)*; do mv "$$unit" "$(NAME)$${unit#$(PACKAGE)}"; done
	cd '$(DIR)' && perl -pi -e 's/\b$(PACKAGE)\b(?!\.rs|::|;)/$(NAME)/g; s/\b$(VARIABLE)_/$(shell echo '$(NAME)' | tr a-z- A-Z_)_/g' \
		Cargo.toml Cargo.lock README.md $$(find systemd -type f)
	cd '$(DIR)' && cargo update --quiet --workspace --offline
