"""f. Everything crashes at a random moment under load, again and again.

The disk beneath byokd has a volatile write cache (parts/lossy.py) and loses its power first; then byokd, the NBD
client and the program are killed, and what ext4 had not written is dropped with the disk. After each crash the
journal of ext4 is replayed, the program starts, its own checks pass, and every acknowledged record is there."""

import random
import time

from parts.lossy import LossyDisk, prove_that_it_loses

from .setting import Setting, go_on_for, scratch_directory


def story(stack, report, make_program, seed, quick):
    rounds, choose = (3 if quick else 10), random.Random(seed)
    beneath = scratch_directory(stack)
    prove_that_it_loses(stack, beneath, report.directory / "lossy.log")
    report.check("the disk beneath loses what was not flushed, and nothing else", True)
    image = beneath / "disk.img"
    with open(image, "wb") as file:
        file.truncate(make_program.volume_mib << 20)
    power = LossyDisk(stack, image, beneath, report.directory / "lossy.log")
    s = Setting(stack, report, make_program, seed, backing=power.device)
    # A crash has to fall into them.
    s.program.hasten()
    s.begin()
    for turn in range(1, rounds + 1):
        go_on_for(report, f"round {turn}: the load runs until the crash", s.program, choose.uniform(1.5, 4 if quick else 10))
        s.no_complaints(f"round {turn}")
        # That was the moment of an acknowledgement, which is not the one to crash at.
        time.sleep(choose.uniform(0, 0.1))
        power.cut()
        report.event(f"crash {turn}")
        for crash in (s.byokd.process.kill, s.disk.process.kill, s.program.kill, s.files.abandon, s.disk.crash, power.clear_away):
            crash()
        power.power_on()
        move_definition(s.byokd.state / "volumes.d" / "v.toml", power.device)
        s.byokd.start()
        s.byokd.ctl("attach", "v")
        s.mount(f"after crash {turn}")
        s.program.start(s.data)
        s.everything_is_there(f"after crash {turn}")
        s.program.load()
        report.event("load goes on")
    series = s.conclude()
    s.byokd.ctl("detach", "v")
    s.byokd.process.stop()
    power.disk.close()
    return series


def move_definition(definition, device):
    """The disk may come back under another name, as disks do."""
    lines = definition.read_text().splitlines()
    definition.write_text("\n".join(f'backing = "{device}"' if line.startswith("backing") else line for line in lines) + "\n")
