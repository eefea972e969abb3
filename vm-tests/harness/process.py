"""Processes that end with whoever started them, however that ended."""

import ctypes
import signal
import subprocess

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def end_with_parent():
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command, **more):
    """Starts a command; from the main thread only, as the kernel takes the thread for the parent."""
    return subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, preexec_fn=end_with_parent,
                            **more)


def end(process):
    if process and process.poll() is None:
        process.kill()
    if process:
        process.wait()
