"""What guests boot: Debian's kernels, an initramfs that finds the root, and the root image, made from
Debian packages alone and kept under a name that changes with whatever goes into them."""

import contextlib
import fcntl
import hashlib
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
GUEST = HERE.parent / "guest"
PROJECT = HERE.parent.parent
CACHE = pathlib.Path(os.environ.get("BYOKD_VM_CACHE") or PROJECT / "target/vm").absolute()

RELEASE = "bookworm"
KERNELS = {"6.1": "linux-image-cloud-amd64", "6.12": "linux-image-6.12-cloud-amd64"}
PACKAGES = [
    "systemd", "systemd-sysv", "dbus", "udev", "kmod", "util-linux", "fdisk", "ca-certificates", "procps", "psmisc", "iproute2",
    "python3", "python3-libnbd", "nbd-client", "libnbd-bin", "nbdkit", "cryptsetup-bin", "fio",
    "e2fsprogs", "xfsprogs", "apt", "dpkg",
]
# The base of the guest is quiet: what tests do not want is masked, so that a boot takes seconds also
# under emulation.
MASKED = [
    "apt-daily.service", "apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service",
    "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "getty.target",
    "serial-getty@ttyS0.service", "systemd-ask-password-console.path", "systemd-ask-password-wall.path",
    "systemd-firstboot.service", "systemd-hwdb-update.service", "systemd-journal-flush.service",
    "systemd-machine-id-commit.service", "systemd-networkd.service", "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service", "systemd-random-seed.service", "systemd-resolved.service",
    "systemd-timesyncd.service", "systemd-tmpfiles-clean.timer", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "proc-sys-fs-binfmt_misc.automount",
]
# Only these are needed before the root is there; all others are in the root image.
FIRST_MODULES = ["virtio_pci", "virtio_blk", "virtio_console"]


class Image:
    """Files to boot from."""

    def __init__(self, place):
        self.root = place / "root.img"
        self.place = place

    def kernel(self, version):
        return self.place / f"vmlinuz-{version}"

    def initramfs(self, version):
        return self.place / f"initramfs-{version}"


def ready(say):
    """The image; made first, if there is none of this version."""
    CACHE.mkdir(parents=True, exist_ok=True)
    place = CACHE / f"image-{fingerprint()}"
    with alone():
        if not place.exists():
            for old in CACHE.glob("image-*"):
                shutil.rmtree(old)
            say("making the guest's image from Debian packages; this takes a minute or two")
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as work:
                work = pathlib.Path(work)
                new = work / "image"
                new.mkdir()
                make(work, new)
                new.rename(place)
    return Image(place)


@contextlib.contextmanager
def alone():
    """One at a time, whoever else starts now."""
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fingerprint():
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for file in sorted(GUEST.glob("*")):
        # What comes with each run instead of the image is not part of it.
        if file.name != "agent":
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def make(work, new):
    tree = work / "root"
    run("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include=" + ",".join(PACKAGES),
        "--aptopt=Acquire::Languages \"none\"", "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*", RELEASE, tree, *sources())
    for version, package in KERNELS.items():
        add_kernel(work, new, tree, version, package)
    settle(tree)
    image = new / "root.img"
    with open(image, "wb") as file:
        file.truncate(1536 << 20)
    # No journal: nobody keeps what a guest writes to its own copy.
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,nodiscard",
        "-d", tree, image)


def sources():
    """Where this machine has Debian's packages from."""
    lines = run("apt-get", "indextargets", "--format", "deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
                "Created-By: Packages", "Origin: Debian").splitlines()
    lines = sorted({line for line in lines if line.split()[2].startswith(RELEASE)})
    if not lines:
        raise SystemExit(f"vm-tests: no Debian {RELEASE} among this machine's package sources\n"
                         "  why: the guest's image is made from them\n"
                         f"  do:  run this on Debian 12, or add {RELEASE} to /etc/apt and `apt-get update`")
    return lines


def add_kernel(work, new, tree, version, package):
    depends = run("apt-cache", "depends", "--important", package)
    real = re.search(r"Depends: (linux-image-\S+)", depends).group(1)
    unpacked = work / real
    unpacked.mkdir()
    run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", real, cwd=unpacked)
    (deb,) = unpacked.glob("*.deb")
    run("dpkg", "-x", deb, unpacked)
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, new / f"vmlinuz-{version}")
    (modules,) = (unpacked / "lib/modules").iterdir()
    target = tree / "usr/lib/modules" / modules.name
    shutil.copytree(modules, target, symlinks=True)
    run("depmod", "-b", tree, modules.name)
    make_initramfs(work / f"initramfs-{version}", target, new / f"initramfs-{version}")


def make_initramfs(tree, modules, target):
    for directory in ("bin", "dev", "proc", "sys", "root", "modules"):
        (tree / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    shutil.copy(GUEST / "init", tree / "init")
    (tree / "init").chmod(0o755)
    dependencies = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, needs = line.split(":")
        dependencies[pathlib.Path(path).name.split(".")[0]] = [path, *needs.split()]
    order = []
    for name in FIRST_MODULES:
        # modules.dep says last what is needed first; a built-in one is not in it.
        for path in reversed(dependencies.get(name, [])):
            if path not in order:
                order.append(path)
    for number, path in enumerate(order):
        data = (modules / path).read_bytes()
        name = pathlib.Path(path).name
        if name.endswith(".xz"):
            data, name = lzma.decompress(data), name[:-3]
        (tree / "modules" / f"{number:02}-{name}").write_bytes(data)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with open(target, "wb") as file:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet", "--owner=0:0"], input=names.encode(), stdout=file,
                       cwd=tree, check=True)


def settle(tree):
    """What makes the tree a guest of ours."""
    units = tree / "etc/systemd/system"
    for unit in MASKED:
        link = units / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    shutil.copy(GUEST / "vm-agent.service", units)
    (units / "basic.target.wants").mkdir(exist_ok=True)
    (units / "basic.target.wants/vm-agent.service").symlink_to("../vm-agent.service")
    for name in ("plain-init", "guest-net"):
        program = tree / "usr/local/sbin" / name
        shutil.copy(GUEST / name, program)
        program.chmod(0o755)
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n10.0.2.2 kms.test\n")
    (tree / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (tree / "etc/fstab").write_text("")
    (tree / "payload").mkdir()
    shutil.rmtree(tree / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(tree / "var/lib/apt/lists", ignore_errors=True)


def run(*command, cwd=None):
    command = [str(word) for word in command]
    try:
        done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise SystemExit(f"vm-tests: there is no {command[0]} in PATH\n  do:  run tests/install/*.sh; for cargo, install Rust") from None
    if done.returncode != 0:
        raise SystemExit(f"vm-tests: {command[0]} failed ({done.returncode})\n"
                         f"  why: {done.stderr.strip()[-2000:]}\n  do:  run tests/install/*.sh, which install what is needed")
    return done.stdout
