"""What a test is given: guests, a key service, disks, and a place for its files. All of it ends with the test."""

import base64
import json
import os
import pathlib
import random
import shutil
import subprocess

from . import process
from .guest import Guest
from .kms import Kms
from .waiting import Failed

PLAIN_SETTINGS = """\
volumes_dir = "/etc/byokd/volumes.d"

[kms]
region = "eu-central-1"
endpoint = "http://10.0.2.2:{port}"

[lease]
probe_interval = "1s"
"""


class Case:
    """One run of one test."""

    def __init__(self, place, sockets, image, kept, accelerator, programs, quick, seed):
        self.place, self.image, self.kept = pathlib.Path(place), image, kept
        # A path of its own: the one of a socket may have little more than a hundred bytes.
        self.sockets = pathlib.Path(sockets)
        self.sockets.mkdir(parents=True, exist_ok=True)
        self.accelerator, self.programs, self.quick = accelerator, programs, quick
        self.random = random.Random(seed)
        self.guests, self.services, self.processes = [], [], []

    def guest(self, name="guest", **how):
        """A guest, not yet on. `how`: those of Guest."""
        guest = Guest(self.place / name, self.sockets / name, self.image, self.kept.payload, self.accelerator, **how)
        self.guests.append(guest)
        return guest

    def prepared(self, prepare, name="guest", **how):
        """A guest that is on, as `prepare` left one of its kind: that one was booted once in this run, and this one goes on
        where it was kept."""
        return self.guest(name, **how).restore(self.kept.guest(self, prepare, how))

    def forget(self, guest):
        """This guest is no longer the case's: it has been saved."""
        self.guests.remove(guest)

    def kms(self):
        """A key service on the host."""
        name = f"kms{len(self.services)}"
        kms = Kms(self.sockets / name, self.place / f"{name}.log", self.programs)
        self.services.append(kms)
        return kms

    def disk(self, name, size):
        """A file for a disk."""
        path = self.place / f"{name}.img"
        with open(path, "wb") as file:
            file.truncate(size)
        return path

    def start(self, command, **more):
        """A process on the host."""
        started = process.start(command, **more)
        self.processes.append(started)
        return started

    def times(self, quick, full):
        """How often to do something, by how much time there is."""
        return quick if self.quick else full

    def say(self, text):
        print(text, flush=True)

    def look(self):
        """What guests that are still on have to say of a failure."""
        for guest in self.guests:
            if guest.qemu and guest.qemu.poll() is None and guest.agent:
                try:
                    guest.attempt("tail -n 200 /run/byokd*.log; journalctl -b --no-pager 2>/dev/null | tail -n 300; dmesg",
                                  timeout=20)
                except Failed as failure:
                    self.say(str(failure))

    def end(self, keep):
        for guest in self.guests:
            process.end(guest.qemu)
            if keep:
                try:
                    guest.keep_root()
                except SystemExit as error:
                    self.say(f"the root disk of {guest.place.name} is not kept: {error}")
        for service in self.services:
            service.end()
        for started in self.processes:
            process.end(started)
        if not keep:
            for path in self.place.rglob("*"):
                if path.suffix in (".img", ".qcow2") or path.name == "memory":
                    path.unlink()


def plain(guest):
    """Nothing is prepared but what every test without systemd wants."""
    guest.run("modprobe nbd")


def start_byokd(guest, kms, settings="", directory="/etc/byokd"):
    """The daemon without systemd, as root, under the key service on the host."""
    guest.put(f"{directory}/byokd.toml", PLAIN_SETTINGS.format(port=kms.port) + settings)
    guest.run(f"""
        mkdir -p /etc/byokd/volumes.d /run/byokd
        export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
        setsid /payload/byokd --config {directory}/byokd.toml >>/run/byokd.log 2>&1 </dev/null &
        echo $! >/run/byokd.pid""")
    guest.until("byokd answers", "/payload/byokctl status >/dev/null 2>&1")


def volume_key(image, kms):
    """The 64 bytes of a volume's key, from the header on the host and KMS: the guest has no part in it."""
    token = json.loads(output(["cryptsetup", "token", "export", "--token-id", "0", image]))
    return base64.b64decode(kms.decrypt(token["ciphertext_blob"], token["encryption_context"]))


def output(command):
    """Runs a command on the host, which has to succeed."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{command}: {done.stderr}")
    return done.stdout


def expect(condition, what):
    if not condition:
        raise Failed(what)
