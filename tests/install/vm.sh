#!/usr/bin/env bash
# Debian packages for vm-tests/run: QEMU, what the guests' image is made with, and byokd's package.
set -euo pipefail
packages=(qemu-system-x86 qemu-utils mmdebstrap busybox-static cpio kmod e2fsprogs cryptsetup-bin nbdkit binutils dpkg-dev python3)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ "${#missing[@]}" -eq 0 ] && exit 0
sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
"${sudo[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
