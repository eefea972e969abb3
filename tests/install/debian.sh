#!/usr/bin/env bash
# Debian packages: the NBD clients, cryptsetup, file systems, RocksDB, promtool and
# Chromium that the tests use.
set -euo pipefail
packages=(
    cmake gcc g++ make
    nbdkit libnbd-bin python3-libnbd qemu-utils fio
    cryptsetup-bin python3-cryptography python3-venv
    curl openssl gdb fuse3 e2fsprogs xfsprogs btrfs-progs rocksdb-tools util-linux groff-base systemd prometheus
    chromium chromium-driver fonts-dejavu-core
)
# local-kms is built with it; any newer Go that is there already does as well.
command -v go >/dev/null || packages+=(golang-go)
source "$(dirname "$0")/packages"
