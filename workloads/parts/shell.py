"""Commands, processes and waiting, for everything else here."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARIES = TARGET / "release"
# What `workloads/fetch` brought.
FETCHED = TARGET / "workloads" / "tools"


class Failure(Exception):
    """A story cannot go on: what was tried and what came of it."""


def outcome(*command, seconds=600, **options):
    """Runs a command: its exit code, what it printed, and what it printed as errors. subprocess.run would wait for ever for
    one that hangs in a disk and cannot be killed."""
    command = [str(c) for c in command]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        said, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        wait(child)
        raise Failure(f"{' '.join(command)} does not end within {seconds} s") from None
    return child.returncode, said, errors


def run(*command, **options):
    """Runs a command that has to succeed; gives what it printed."""
    code, said, errors = outcome(*command, **options)
    if code:
        raise Failure(f"{' '.join(map(str, command))} ended with {code}: {said}{errors}")
    return said


def does(*command, seconds=60):
    """Whether a command succeeds; for what may be done or not wanted any more."""
    with contextlib.suppress(Failure):
        return outcome(*command, seconds=seconds)[0] == 0
    return False


def java_home():
    """JAVA_HOME, or that of the java in PATH."""
    found, java = os.environ.get("JAVA_HOME"), shutil.which("java")
    if not (found or java):
        raise Failure("there is no Java: neither JAVA_HOME nor java in PATH")
    return found or str(pathlib.Path(java).resolve().parents[1])


def wait(child, seconds=60):
    """For a process that has no more to do, or was killed."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        raise Failure(f"{child.args[0]} cannot be ended: after {seconds} s it is still there, which is what hanging in a disk looks like") from None


def until(what, so, seconds=60):
    """Waits for something to become so; gives the seconds that it took."""
    begun = time.monotonic()
    while not so():
        if time.monotonic() - begun > seconds:
            raise Failure(f"waited {seconds} s in vain: {what}")
        time.sleep(0.01)
    return time.monotonic() - begun


class Process:
    """A program with a log, killed at the latest when the stack unwinds."""

    def __init__(self, stack, command, log, **options):
        self.log = log
        with open(log, "ab") as out:
            self.child = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)
        stack.callback(self.kill)

    def ended(self):
        return self.child.poll() is not None

    def kill(self):
        """As a crash ends it: without a word."""
        if not self.ended():
            self.child.kill()
        wait(self.child)

    def stop(self, seconds=60):
        """Asks it to end, and gives its exit code."""
        if not self.ended():
            self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.child.args[0]} does not end {seconds} s after SIGTERM") from None
