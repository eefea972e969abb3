#!/usr/bin/env bash
# Debian packages for vm-tests/run: QEMU, what the guests' image is made with, and byokd's package.
set -euo pipefail
packages=(qemu-system-x86 qemu-utils mmdebstrap busybox-static cpio kmod e2fsprogs cryptsetup-bin nbdkit binutils dpkg-dev python3)
source "$(dirname "$0")/packages"
