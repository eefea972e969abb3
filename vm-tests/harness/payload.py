"""What is tested: the freshly built programs, on a disk that each guest mounts at /payload."""

import fcntl
import os
import pathlib
import shutil
import subprocess
import tempfile

from . import image

BINARIES = ("byokd", "byokctl", "byokd-kernel")


def build(say):
    """Builds the programs, and the disk if anything on it has changed. Where the programs are."""
    say("building byokd")
    done = subprocess.run(["cargo", "build", "--locked", "--quiet", "--bins"], cwd=image.PROJECT)
    if done.returncode != 0:
        raise SystemExit("vm-tests: cargo build failed")
    files = [programs() / name for name in BINARIES] + [image.GUEST / "agent"]
    files += [path for path in sorted((image.HERE.parent / "payload").glob("*")) if path.is_file()]
    files += [image.PROJECT / "systemd"]
    with open(image.CACHE / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=image.CACHE) as tree:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in files:
            if file.is_dir():
                shutil.copytree(file, pathlib.Path(tree) / file.name)
            elif file.parent == programs():
                subprocess.run(["strip", "-o", f"{tree}/{file.name}", file], check=True)
            else:
                shutil.copy(file, tree)
        new = disk().with_suffix(".new")
        with open(new, "wb") as empty:
            empty.truncate(256 << 20)
        image.run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree, new)
        new.rename(disk())
    return programs()


def programs():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or image.PROJECT / "target").absolute()
    return target / "debug"


def disk():
    return image.CACHE / "payload.img"
