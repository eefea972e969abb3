"""One guest: QEMU, its disks, its console in a file, and commands run by the agent inside."""

import base64
import json
import os
import pathlib
import queue
import shlex
import shutil
import socket
import subprocess
import threading
import time

from . import image, process
from .waiting import Failed, wait_for

# How long a guest may take to boot: seconds under KVM, a quarter of a minute under emulation, more when
# two others share the processors.
BOOT = 400
# The file that a guest's machine is saved in.
MACHINE = "machine"
# What a command may take unless a test says otherwise.
PATIENCE = 300


class Guest:
    """A machine that a test turns on and off. Its root disk is its own and outlives a reboot. Emulated, a second
    processor costs a fifth more time than it saves: those have one whose work has to run at the same time."""

    def __init__(self, place, sockets, boot_image, payload, accelerator, *, systemd=False, kernel="6.1", memory=1024, cpus=1,
                 disks=(), append=""):
        self.place, self.sockets = pathlib.Path(place), pathlib.Path(sockets)
        for directory in (self.place, self.sockets):
            directory.mkdir(parents=True, exist_ok=True)
        self.systemd, self.kernel = systemd, kernel
        self.image, self.payload, self.accelerator = boot_image, payload, accelerator
        self.memory, self.cpus, self.disks, self.append = memory, cpus, list(disks), append
        self.qemu = self.agent = None
        self.restored = None
        self.root_upon(self.image.root, "raw")

    def root_upon(self, path, form):
        """A root disk that is this one until the guest writes to it."""
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", path, self.root], check=True)

    def keep_root(self):
        """Its root disk will no longer need those of guests that were kept for this run."""
        if self.root.exists():
            image.run("qemu-img", "rebase", "-f", "qcow2", "-F", "raw", "-b", self.image.root, self.root)

    @property
    def root(self):
        return self.place / "root.qcow2"

    @property
    def console(self):
        return self.place / "console.log"

    def boot(self):
        """Turns it on and waits for the agent."""
        console = self.console.stat().st_size if self.console.exists() else 0
        deadline = time.monotonic() + BOOT
        try:
            self.turn_on(self.disks, deadline, wait="off")
            self.release = self.agent.hello(deadline)
        except Failed as failure:
            tail = self.console.read_bytes()[console:][-1500:].decode(errors="replace") if self.console.exists() else ""
            raise Failed(f"the guest did not boot: {failure}\n{tail}") from None
        return self

    def save(self, place):
        """Keeps its machine, memory and all, and its root disk for `restore`, and ends it. It may have no other disks."""
        self.qmp("stop")
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        machine = quote(place / MACHINE)
        # It is called that once all of it is there.
        self.qmp("migrate", uri=f"exec:cat >{machine}.part && mv {machine}.part {machine}")
        self.until_migrated()
        wait_for((place / MACHINE).exists, "the memory is written")
        process.end(self.qemu)
        self.root.rename(place / self.root.name)
        shutil.copy(self.console, place)

    def restore(self, place=None):
        """Goes on where the guest was that was saved there, which had as many processors and as much memory; again, if
        it has done so before."""
        self.restored = place = place or self.restored
        self.root_upon(place / self.root.name, "qcow2")
        shutil.copy(place / self.console.name, self.console)
        try:
            # Its end of the agent's port is open: ours has to be, too, before it goes on.
            self.turn_on((), time.monotonic() + BOOT, wait="on", more=("-incoming", f"exec:cat {quote(place / MACHINE)}"))
            self.until_migrated()
            self.qmp("cont")
            # Its clock has stood still meanwhile, and its random numbers would be those of every guest from there.
            seed = base64.b64encode(os.urandom(32)).decode()
            self.release = self.agent.ask({"wake": time.time(), "seed": seed}).succeeds()
        except (Failed, OSError, ValueError) as failure:
            raise Failed(f"the guest did not go on where it was kept: {failure}\n{(self.place / 'qemu.log').read_text()[-1500:]}") from None
        for number, disk in enumerate(self.disks):
            self.plug(number, disk)
        return self

    def until_migrated(self):
        def done():
            state = self.qmp("query-migrate").get("status")
            if state == "failed":
                raise Failed("QEMU: the migration failed")
            return state == "completed"

        wait_for(done, "the machine has moved", PATIENCE)

    def plug(self, number, disk):
        """One more disk, while it is on."""
        name = f"disk{number}"
        options = f"{disk},if=none,id={name}".replace("\\", "\\\\").replace('"', '\\"')
        said = self.qmp("human-monitor-command", **{"command-line": f'drive_add 0 "{options}"'})
        if said.strip() != "OK":
            raise Failed(f"QEMU: drive_add: {said}")
        self.qmp("device_add", driver="virtio-blk-pci", drive=name, serial=name, id=name)
        self.until(f"{name} is there", f"grep -qs {name} /sys/block/vd*/serial")

    def turn_on(self, disks, deadline, wait, more=()):
        """Starts QEMU, and is connected to the agent."""
        sockets = {name: self.sockets / name for name in ("agent", "qmp")}
        for path in sockets.values():
            path.unlink(missing_ok=True)
        init = "/lib/systemd/systemd" if self.systemd else "/usr/local/sbin/plain-init"
        # Emulated on a busy machine, ticks come late: the check that the timer works would panic.
        words = (f"console=ttyS0 no_timer_check panic=-1 oops=panic net.ifnames=0 mitigations=off systemd.show_status=0 "
                 f"random.trust_cpu=on vm.init={init} loglevel=5 {self.append}")
        command = ["qemu-system-x86_64", *accelerate(self.accelerator), "-smp", self.cpus, "-m", self.memory,
                   "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                   "-kernel", self.image.kernel(self.kernel), "-initrd", self.image.initramfs(self.kernel),
                   "-append", words,
                   "-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console",
                   "-chardev", f"socket,id=qmp,path={sockets['qmp']},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
                   "-device", "virtio-serial-pci",
                   "-chardev", f"socket,id=agent,path={sockets['agent']},server=on,wait={wait}",
                   "-device", "virtserialport,chardev=agent,name=agent",
                   "-chardev", f"file,id=records,path={self.place}/records,append=on",
                   "-device", "virtserialport,chardev=records,name=records",
                   "-device", "virtio-rng-pci",
                   "-netdev", "user,id=net,restrict=off", "-device", "virtio-net-pci,netdev=net,romfile=",
                   *drive("root", f"file={self.root},format=qcow2,cache=unsafe"),
                   *drive("payload", f"file={self.payload},format=raw,readonly=on"), *more]
        for number, disk in enumerate(disks):
            command += drive(f"disk{number}", disk)
        self.agent = None
        self.qemu = process.start(command, stdout=subprocess.DEVNULL, stderr=open(self.place / "qemu.log", "a"))
        self.agent = Agent(connect(sockets["agent"], self.qemu, deadline - time.monotonic()), self.place / "commands.log")

    def run(self, commands, timeout=PATIENCE):
        """Runs shell commands under `set -e`, which looks past all but the last of `a && b` unless it is the end: one
        command a line, or `a; b`. They have to succeed. What they printed."""
        status, output = self.attempt(f"set -e\n{commands}", timeout)
        if status != 0:
            raise Failed(f"in the guest: {commands}\nended with {status}:\n{output[-4000:]}")
        return output

    def attempt(self, commands, timeout=PATIENCE):
        """Runs shell commands: their status and what they printed."""
        return self.start(commands).wait(timeout)

    def start(self, commands):
        """Runs shell commands beside others: something to wait for."""
        return self.agent.ask({"run": commands})

    def put(self, path, data, mode=0o644):
        """Writes a file in the guest."""
        data = data.encode() if isinstance(data, str) else data
        self.agent.ask({"put": path, "data": base64.b64encode(data).decode(), "mode": mode}).wait(PATIENCE)

    def until(self, what, commands, timeout=PATIENCE):
        """Waits in the guest until a shell condition holds."""
        return self.run_until(":", what, commands, timeout)

    def run_until(self, begin, what, commands, timeout=PATIENCE):
        """Runs shell commands, which have to succeed, and then waits in the guest until a shell condition holds: in
        one go, since under emulation each one costs a good part of a second."""
        # As a function, so that it also ends here if the last thing in it is an `a && b` whose `a` fails.
        script = f"""set -e
            begin() {{ {begin}
            }}
            begin
            set +e
            end=$((SECONDS + {timeout}))
            until {{ {commands}
            }}; do [ $SECONDS -lt $end ] || exit 99; sleep 0.1; done"""
        status, output = self.attempt(script, timeout + PATIENCE)
        if status == 99:
            raise Failed(f"waited {timeout} s in vain: {what}\n{output[-3000:]}")
        if status != 0:
            raise Failed(f"in the guest: {begin}\nended with {status}:\n{output[-4000:]}")
        return output

    def qmp(self, command, **arguments):
        """One command to QEMU's monitor."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(PATIENCE)
            monitor.connect(str(self.sockets / "qmp"))
            lines = monitor.makefile("rw")
            lines.readline()
            for asked in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(asked) + "\n")
                lines.flush()
                while True:
                    reply = json.loads(lines.readline())
                    if "event" not in reply:
                        break
            if "error" in reply:
                raise Failed(f"QEMU: {command}: {reply['error']}")
            return reply["return"]

    def memory_dump(self):
        """All of the guest's memory in a file."""
        path = self.place / "memory"
        self.qmp("stop")
        try:
            self.qmp("pmemsave", val=0, size=self.memory << 20, filename=str(path))
        finally:
            self.qmp("cont")
        return path

    def cut_power(self):
        """Ends it in the middle of whatever it does."""
        process.end(self.qemu)

    def shut_down(self, timeout=PATIENCE):
        """Turns it off as an administrator does."""
        self.start("systemctl poweroff" if self.systemd else "sync; poweroff -f")
        try:
            self.qemu.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"the guest did not shut down in {timeout} s") from None

    def reboot(self):
        self.shut_down()
        self.boot()

    def dmesg(self):
        return self.run("dmesg")

    def clean_dmesg(self, allowed=()):
        """The kernel had nothing to say of errors, hangs or file systems in trouble."""
        bad = ("I/O error", "Buffer I/O", "blocked for more than", "Aborting journal", "EXT4-fs error", "EXT4-fs warning",
               "XFS (", "BUG:", "WARNING:", "Call Trace", "Remounting", "timed out")
        fine = ("Mounting", "Ending clean", "Unmounting", "Starting recovery", "Ending recovery", *allowed)
        lines = [line for line in self.dmesg().splitlines()
                 if any(word in line for word in bad) and not any(word in line for word in fine)]
        if lines:
            raise Failed("the kernel said:\n" + "\n".join(lines[:40]))


class Agent:
    """The wire to the agent in the guest."""

    def __init__(self, wire, log):
        self.wire, self.log = wire, open(log, "a", buffering=1)
        self.pending, self.number, self.lock = {}, 0, threading.Lock()
        self.greeting = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def hello(self, deadline):
        try:
            return self.greeting.get(timeout=max(1, deadline - time.monotonic()))
        except queue.Empty:
            raise Failed("its agent said nothing") from None

    def listen(self):
        try:
            for line in self.wire.makefile("rb"):
                # What the port carried before the agent opened it is none of ours.
                message = json.loads(line)
                if "hello" in message:
                    self.greeting.put(message["hello"])
                    continue
                self.log.write(f"{stamp()} #{message['id']} -> {message['status']}\n{message.get('output', '')}\n")
                with self.lock:
                    asked = self.pending.pop(message["id"])
                asked.reply.put(message)
        except (OSError, ValueError):
            pass
        with self.lock:
            for asked in self.pending.values():
                asked.reply.put(None)

    def ask(self, request):
        with self.lock:
            self.number += 1
            asked = Asked(self.number, request.get("run") or request.get("put") or "wake")
            self.pending[self.number] = asked
        self.log.write(f"{stamp()} #{asked.number} {asked.what}\n")
        try:
            self.wire.sendall(json.dumps({"id": asked.number, **request}).encode() + b"\n")
        except OSError:
            asked.reply.put(None)
        return asked


class Asked:
    """A command that runs in the guest."""

    def __init__(self, number, what):
        self.number, self.what, self.reply = number, what, queue.Queue()

    def wait(self, timeout=PATIENCE):
        """Its status and what it printed."""
        try:
            message = self.reply.get(timeout=timeout)
        except queue.Empty:
            raise Failed(f"in the guest, not done after {timeout} s: {self.what}") from None
        if message is None:
            raise Failed(f"the guest ended during: {self.what}")
        return message["status"], message.get("output", "")

    def succeeds(self, timeout=PATIENCE):
        """What it printed; it has to succeed."""
        status, output = self.wait(timeout)
        if status != 0:
            raise Failed(f"in the guest: {self.what}\nended with {status}:\n{output[-4000:]}")
        return output

    def ended(self):
        return not self.reply.empty()


def connect(path, qemu, timeout):
    def connected():
        wire = socket.socket(socket.AF_UNIX)
        try:
            wire.connect(str(path))
        except OSError:
            wire.close()
            return None
        return wire

    return wait_for(connected, "QEMU listens", timeout, of=qemu)


def drive(name, what):
    return ["-drive", f"{what},if=none,id={name}", "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def accelerate(accelerator):
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # A processor without AVX: what programs use where they find it is a fifth slower to emulate.
    return ["-accel", "tcg,thread=multi", "-cpu", "Westmere"]


def choose_accelerator(boot_image, say):
    """KVM if a guest really boots under it in time: a /dev/kvm that opens may still run nothing."""
    wanted = os.environ.get("BYOKD_VM_ACCEL", "auto")
    if wanted != "auto":
        return wanted
    verdict = image.CACHE / "accelerator"
    if verdict.exists():
        return verdict.read_text().strip()
    chosen = "kvm" if os.access("/dev/kvm", os.W_OK) and boots_under_kvm(boot_image) else "tcg"
    verdict.write_text(chosen)
    say(f"accelerator: {chosen} (kept in {verdict})")
    return chosen


def boots_under_kvm(boot_image):
    # Without a root disk the initramfs gives up after ten seconds and says so: that is enough to see.
    command = ["qemu-system-x86_64", *accelerate("kvm"), "-smp", "2", "-m", "512", "-nodefaults", "-display", "none",
               "-no-reboot", "-serial", "stdio", "-kernel", str(boot_image.kernel("6.1")),
               "-initrd", str(boot_image.initramfs("6.1")), "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=25,
                              preexec_fn=process.end_with_parent)
    except subprocess.TimeoutExpired:
        return False
    return b"vm-tests: no root disk" in done.stdout


def quote(text):
    return shlex.quote(str(text))


def stamp():
    now = time.time()
    return time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 10) % 10}"
