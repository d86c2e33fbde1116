# Builds packages. package-files collects the files; it leaves out drop-ins that the systemd of this machine is too old
# for, unless SYSTEMD=VERSION names that of the target.
PACKAGES := target/packages
FILES := $(PACKAGES)/files
# Not empty if the binary was built with the feature log-control. Otherwise nothing takes the D-Bus name, so the files for
# it are not installed. Evaluated in recipes, after the binary was built.
LOG_CONTROL = $(shell grep -lsF org.freedesktop.LogControl1 $(BINARY))
# A binary that `make install` built without cargo-auditable has no list of its crates, so it is built again.
.PHONY: auditable-binary
auditable-binary: cargo-auditable
	@$(MAKE) --no-print-directory $$(grep -qs '\.dep-v0' $(BINARY) || echo --what-if=Cargo.toml) $(BINARY)
.PHONY: package-files
package-files: auditable-binary
	rm -rf $(FILES)
	$(MAKE) --no-print-directory install DESTDIR=$(FILES) PREFIX=/usr
	strip --strip-unneeded --remove-section=.comment --remove-section=.note $(FILES)/usr/bin/$(PACKAGE)
	cargo build --quiet --workspace --example documents
	$${CARGO_TARGET_DIR:-target}/debug/examples/documents $(FILES)
	$(if $(LOG_CONTROL),install -D -m 644 -t $(FILES)/usr/share/dbus-1/system.d packaging/local.$(PACKAGE).conf)
	$(if $(LOG_CONTROL),install -D -m 644 packaging/sysusers.conf $(FILES)/usr/lib/sysusers.d/$(PACKAGE).conf)
	install -D -m 644 packaging/changelog $(FILES)/usr/share/doc/$(PACKAGE)/changelog
	mkdir -p $(addprefix $(PACKAGES)/,deb rpm)
	cd outlive/packaging && for script in deb/* rpm/*; do \
		sed -e '/^@TAKE_OVER@$$/{r take_over.sh' -e 'd}' $$script | \
		sed 's/@NAME@/$(PACKAGE)/g; s/@VARIABLE@/$(VARIABLE)/g; s/@SOCKETS@/$(notdir $(filter %.socket,$(UNITS)))/g' \
			>$(CURDIR)/$(PACKAGES)/$$script; done
	gzip -9 --no-name $(FILES)/usr/share/man/man1/*.1 $(FILES)/usr/share/doc/$(PACKAGE)/changelog

# DEB and RPM are further options for cargo-deb and cargo-generate-rpm, such as DEB=--fast.
.PHONY: deb rpm
deb: package-files cargo-deb
	rm -f $(PACKAGES)/$(PACKAGE)_*.deb
	cargo deb --no-build $(DEB) --output $(PACKAGES)/
rpm: package-files cargo-generate-rpm
	rm -f $(PACKAGES)/$(PACKAGE)-*.rpm
	cargo generate-rpm $(RPM) --output $(PACKAGES)/

# The tools are built without optimization, except crates that hash and compress, because they process the whole
# package.
OPTIMIZED := keccak sha2 sha3 zstd-sys
cargo-generate-rpm: INSTALL_TOOL += $(OPTIMIZED:%=--config profile.dev.package.%.opt-level=3)
.PHONY: cargo-auditable cargo-deb cargo-generate-rpm
cargo-auditable cargo-deb cargo-generate-rpm:
	@command -v $@ >/dev/null || $(INSTALL_TOOL) $@
