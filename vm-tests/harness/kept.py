"""Guests that were booted once in a run, and kept for the tests of it: a boot takes longer than many a test."""

import fcntl
import hashlib
import os
import pathlib
import shutil

from . import image, payload


class Kept:
    """A run's own place: the programs that it tests, and guests that have them."""

    def __init__(self, place):
        self.place = pathlib.Path(place)
        self.payload = self.place / "payload.img"

    @classmethod
    def begin(cls):
        """A new one; whatever a run that was killed left of its own goes."""
        for place in image.CACHE.glob("kept-*"):
            if not pathlib.Path("/proc", place.name.removeprefix("kept-")).exists():
                shutil.rmtree(place)
        kept = cls(image.CACHE / f"kept-{os.getpid()}")
        kept.place.mkdir()
        # Another run may build its own meanwhile; the file itself is never written to again.
        os.link(payload.disk(), kept.payload)
        return kept

    def end(self):
        shutil.rmtree(self.place)

    def guest(self, case, prepare, how):
        """Where a guest made like that is kept, to which `prepare` was done. `case` boots it if none did before; its disks
        are no part of it."""
        kind = {name: value for name, value in how.items() if name != "disks"}
        name = f"{prepare.__name__}-{hashlib.sha256(repr(sorted(kind.items())).encode()).hexdigest()[:8]}"
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
