# `make help` lists the commands. They are in outlive/template.mk, which `make update` replaces with the rest of outlive/,
# so rules of your own belong in this file.

# The binary, the units and the prefix of the environment variables have the name of the package.
PACKAGE := $(shell sed -n '/^name = /{s/.*"\(.*\)"/\1/p;q}' Cargo.toml)

include $(dir $(lastword $(MAKEFILE_LIST)))outlive/template.mk
-include e2e/e2e.mk
