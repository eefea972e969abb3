"""NBD servers, each over the same kind of backing store, ready to be measured."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TICK = os.sysconf("SC_CLK_TCK")
GIB = 1 << 30

# What cryptsetup leaves before the data of a LUKS1 device, and byokd before that of a volume.
LUKS1_HEADER = 2 << 20
BYOKD_HEADER = 16 << 20
NAMES = ["byokd", "nbdkit", "nbdkit-luks", "qemu-luks", "nbdkit-null", "direct"]
NEEDED = ("fio", "nbdkit", "qemu-nbd", "nbdcopy", "nbdinfo", "/usr/sbin/cryptsetup", "/usr/sbin/losetup")


def run(*command, **options):
    """Runs a command that has to succeed; gives what it printed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def cpu_seconds(process):
    """What it has taken so far."""
    stat = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(stat[11]) + int(stat[12])) / TICK


def end(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def fio(common, jobs):
    """What fio says of each job: `jobs` are pairs of a name and options, which come on top of the common ones."""
    words = lambda options: [f"--{k}={v}" for k, v in options.items()]
    said = run("fio", "--output-format=json", *words(common), *(word for name, job in jobs for word in (f"--name={name}", *words(job))))
    return json.loads(said[said.index("{"):])["jobs"]


def until(what, so, seconds=30):
    deadline = time.monotonic() + seconds
    while not so():
        if time.monotonic() > deadline:
            sys.exit(f"waited in vain: {what}")
        time.sleep(0.02)


class Place:
    """Where the backing stores lie: files in one directory, each behind a loop device if wanted."""

    def __init__(self, directory, loop, stack):
        self.directory, self.loop, self.stack = directory, loop, stack

    def store(self, name, size):
        """A store of that many bytes: a path to a file or to a block device."""
        path = self.directory / f"{name}.img"
        with open(path, "wb") as file:
            # In one piece, as far as that goes: no store is to be slower for how its blocks came to lie.
            os.posix_fallocate(file.fileno(), 0, size)
        if not self.loop:
            return path
        device = run("/usr/sbin/losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", path).strip()
        self.stack.callback(run, "/usr/sbin/losetup", "--detach", device)
        return pathlib.Path(device)

    def in_memory(self):
        return run("stat", "--file-system", "--format=%T", self.directory).strip() in ("tmpfs", "ramfs")


class Server:
    """A process that serves one export at a URI."""

    def __init__(self, command, uri, log):
        self.uri = uri
        with open(log, "wb") as out:
            self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def target(self):
        """What tells fio where to go."""
        return dict(ioengine="nbd", uri=self.uri)

    def wait(self):
        def up():
            if self.process.poll() is not None:
                sys.exit(f"{self.process.args[0]} ended with {self.process.returncode}")
            return subprocess.run(["nbdinfo", "--size", self.uri], capture_output=True).returncode == 0

        until(f"{self.process.args[0]} serves", up)

    def cpu(self):
        return cpu_seconds(self.process)

    def resident(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(l.split()[1]) / 1024 for l in status.splitlines() if l.startswith("VmRSS"))

    def stop(self):
        end(self.process)


class Direct:
    """No server: fio itself on the plain store, by io_uring and past the page cache where that goes."""

    def __init__(self, plain, in_memory):
        self.plain, self.in_memory = plain, in_memory

    def target(self):
        return dict(ioengine="io_uring", filename=self.plain, direct=int(not self.in_memory))

    def wait(self):
        pass

    def cpu(self):
        return 0.0

    def resident(self):
        return 0.0

    def stop(self):
        pass


def fill(path, size):
    """Bytes that nobody can compress, and that are really there."""
    with open(path, "r+b") as out:
        for _ in range(size >> 20):
            out.write(os.urandom(1 << 20))
        os.fsync(out.fileno())


def start(name, place, scratch, size, plain):
    """That server, holding what `plain` holds."""
    if name == "byokd":
        return _byokd(place, scratch, size, plain)
    if name == "direct":
        return Direct(plain, place.in_memory())
    return _peer(name, place, scratch, size, plain)


def _byokd(place, scratch, size, plain):
    """byokd with its development KMS; the volume is filled through it."""
    binaries = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    state = scratch / "byokd"
    server = Server([binaries / "byokd", "--dev", "--state-dir", state],
                    f"nbd+unix:///v?socket={state}/nbd/v.sock", scratch / "byokd.log")
    with contextlib.ExitStack() as failed:
        failed.callback(server.stop)
        ctl = lambda *args: run(binaries / "byokctl", "--socket", state / "byokd.sock", *args,
                                env={**os.environ, "BYOKD_STATE_DIR": str(state)}).strip()
        until("byokd's control socket", (state / "byokd.sock").exists)
        key = ctl("dev", "key", "create")
        # It makes a file itself; of a device, a size of 0 is all of it.
        backing = place.store("byokd", size + BYOKD_HEADER) if place.loop else place.directory / "byokd.img"
        extent = ("--size", 0) if place.loop else ("--size", size, "--preallocate")
        ctl("volume", "create", "v", "--backing", backing, *extent, "--key", key, "--purpose", "zeebe")
        ctl("attach", "v")
        run("nbdcopy", plain, server.uri)
        failed.pop_all()
    return server


def _peer(name, place, scratch, size, plain):
    socket = scratch / f"{name}.sock"
    uri = f"nbd+unix:///?socket={socket}"
    secret = scratch / "secret"
    secret.write_text("passphrase")
    luks = None
    if name.endswith("luks"):
        luks = place.store(name, size + LUKS1_HEADER)
        # Both read LUKS1 only. Iterations are about passphrases, not about speed of the data.
        run("/usr/sbin/cryptsetup", "luksFormat", "--type", "luks1", "--batch-mode", "--cipher", "aes-xts-plain64", "--key-size", "512",
            "--pbkdf-force-iterations", "1000", luks, secret)
    driver = "host_device" if place.loop else "file"
    commands = {
        "nbdkit": ["nbdkit", "-f", "-U", socket, "file", plain],
        "nbdkit-luks": ["nbdkit", "-f", "-U", socket, "--filter=luks", "file", luks, f"passphrase=+{secret}"],
        "qemu-luks": ["qemu-nbd", "--persistent", "--shared=64", "-k", socket, "--object", f"secret,id=s,file={secret}",
                      "--image-opts", f"driver=luks,key-secret=s,file.driver={driver},file.filename={luks}"],
        "nbdkit-null": ["nbdkit", "-f", "-U", socket, "null", str(size)],
    }
    server = Server(commands[name], uri, scratch / f"{name}.log")
    with contextlib.ExitStack() as failed:
        failed.callback(server.stop)
        until(f"{name} listens", socket.exists)
        if luks:
            server.wait()
            run("nbdcopy", plain, uri)
        failed.pop_all()
    return server


def missing():
    """The tools that are not there."""
    return [tool for tool in NEEDED if not shutil.which(tool)]
