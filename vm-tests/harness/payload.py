"""What is tested: the freshly built programs, on a disk that each guest mounts at /payload."""

import os
import pathlib
import shutil
import subprocess
import tempfile

from . import image

BINARIES = ("byokd", "byokctl", "byokd-kernel")
# Of workloads/, what runs in a guest.
WORKLOAD = ("programs/journal_writer.py", "parts/acks.py", "parts/__init__.py")


def build(say, release, packages, disk):
    """Builds the programs, two versions of the Debian package if wanted, and the disk with them."""
    say("building byokd")
    # The same programs as of `cargo build --release`: where that was done before, nothing is compiled again.
    try:
        done = subprocess.run(["cargo", "build", "--locked", "--quiet", "--bins", *(["--release"] if release else [])],
                              cwd=image.PROJECT)
    except FileNotFoundError:
        raise SystemExit("vm-tests: there is no cargo in PATH\n  do:  install Rust, and for root as well") from None
    if done.returncode != 0:
        raise SystemExit("vm-tests: cargo build failed")
    built = programs(release)
    files = [built / name for name in BINARIES] + [image.GUEST / "agent"]
    files += [path for path in sorted((image.HERE.parent / "payload").glob("*")) if path.is_file()]
    files += [image.PROJECT / "systemd"]
    with tempfile.TemporaryDirectory(dir=disk.parent) as tree:
        for file in files:
            if file.is_dir():
                shutil.copytree(file, pathlib.Path(tree) / file.name)
            elif file.parent == built:
                subprocess.run(["strip", "-o", f"{tree}/{file.name}", file], check=True)
            else:
                shutil.copy(file, tree)
        for name in WORKLOAD:
            copy = pathlib.Path(tree) / "workloads" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image.PROJECT / "workloads" / name, copy)
        for version in (1, 2) if packages else ():
            say(f"making package {version}")
            image.run(image.PROJECT / "packaging/deb", "--no-build", "--profile", "release" if release else "dev",
                      "--compression", 0, "--version", version, "--output", f"{tree}/byokd_{version}.deb", cwd=image.PROJECT)
        with open(disk, "wb") as empty:
            empty.truncate(256 << 20)
        image.run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree, disk)


def programs(release):
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or image.PROJECT / "target").absolute()
    return target / ("release" if release else "debug")
