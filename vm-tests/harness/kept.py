"""Guests that were booted once in a run, and kept for the tests of it: a boot takes longer than many a test."""

import fcntl
import hashlib
import pathlib
import shutil
import tempfile

from . import image


class Kept:
    """A run's own place: the programs that it tests, guests that have them, and the sockets of its tests' guests."""

    def __init__(self, place, sockets):
        self.place, self.sockets = pathlib.Path(place), pathlib.Path(sockets)
        self.payload = self.place / "payload.img"
        self.lock = None

    @classmethod
    def begin(cls):
        """A new one; whatever a run that was killed left of its own goes."""
        # One at a time, so that none is taken for left before its run has locked it.
        with image.alone():
            for place in image.CACHE.glob("kept-*"):
                remove_if_left(place)
            # The path of a socket may have little more than a hundred bytes.
            kept = cls(tempfile.mkdtemp(dir=image.CACHE, prefix="kept-"), tempfile.mkdtemp(prefix="byokd-vm-"))
            kept.lock = open(kept.place / "lock", "w")
            kept.lock.write(str(kept.sockets))
            kept.lock.flush()
            fcntl.flock(kept.lock, fcntl.LOCK_EX)
        return kept

    def end(self):
        for place in (self.place, self.sockets):
            shutil.rmtree(place, ignore_errors=True)

    def guest(self, case, prepare, how):
        """Where a guest made like that is kept, to which `prepare` was done. `case` boots it if none did before; its disks
        are no part of it."""
        kind = {name: value for name, value in how.items() if name != "disks"}
        identity = repr((prepare.__module__, prepare.__name__, sorted(kind.items())))
        name = f"{prepare.__name__}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        place = self.place / name
        with open(self.place / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                new = self.place / f"{name}.new"
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                guest = case.guest(f"kept-{name}", **kind).boot()
                prepare(guest)
                guest.save(new)
                case.forget(guest)
                new.rename(place)
        return place


def remove_if_left(place):
    """A run holds its lock as long as it lives, wherever that is."""
    try:
        with open(place / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sockets = lock.read()
    except BlockingIOError:
        return
    except FileNotFoundError:
        sockets = ""
    for left in filter(None, (str(place), sockets)):
        shutil.rmtree(left, ignore_errors=True)
