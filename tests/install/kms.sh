#!/bin/sh
# Installs the key services that others wrote, for tests/it/other_kms.rs: local-kms (Go) and ministack
# (Python). Into ${BYOKD_TEST_TOOLS:-target/test-tools}; what is there already stays. Needs go and
# python3 (with venv).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=${BYOKD_TEST_TOOLS:-$here/../../target/test-tools}
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)

# What is installed is written beside it, so that a new version here is installed anew.
installed() {
    [ -x "$1" ] && [ -f "$1.version" ] && [ "$(cat "$1.version")" = "$2" ]
}

# The version is pinned by go.mod and go.sum beside main.go.
local_kms=$(cat "$here/local-kms/main.go" "$here/local-kms/go.sum" | cksum)
if installed "$tools/local-kms" "$local_kms"; then
    echo "local-kms: there already"
else
    (cd "$here/local-kms" && go build -mod=readonly -buildvcs=false -o "$tools/local-kms" .)
    echo "$local_kms" >"$tools/local-kms.version"
    echo "local-kms: installed"
fi

ministack=1.5.33
if installed "$tools/ministack/bin/ministack" "$ministack"; then
    echo "ministack: there already"
else
    rm -rf "$tools/ministack"
    python3 -m venv "$tools/ministack"
    "$tools/ministack/bin/pip" install --quiet --disable-pip-version-check "ministack==$ministack"
    echo "$ministack" >"$tools/ministack/bin/ministack.version"
    echo "ministack: installed"
fi
