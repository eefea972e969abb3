"""Waiting on the host for what something else does, and what is raised when it does not."""

import time


class Failed(Exception):
    """A test failed; its text says how."""


def wait_for(condition, what, timeout=120, of=None):
    """Waits until it holds, and gives what it gave; in vain once the process ended that it is to come from."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        if of is not None and of.poll() is not None:
            raise Failed(f"in vain: {what}; {of.args[0]} ended with {of.returncode}")
        if time.monotonic() > end:
            raise Failed(f"waited {timeout:.0f} s in vain: {what}")
        time.sleep(0.05)
    return found
