"""A program's own pattern on /dev/nbdX: Zeebe's journal, mapped segments and all, by the generator of workloads/."""

from harness.case import expect
from harness.service import LINK, another_daemon_serves, goes_on, served

JOURNAL = "python3 /payload/workloads/programs/journal_writer.py {} /mnt/journal /run/acks 7 4"
# A crash is noticed when requests that were under way have waited for so long; emulation takes as much again.
LONGEST = 2 * 6000


def zeebes_journal_goes_on_over_restarts_and_crashes_and_loses_nothing_to_a_denial(case):
    guest, kms, key = served(case, size="256M", cpus=2, definition='request_timeout = "6s"')
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    writer = guest.start("exec " + JOURNAL.format("append"))
    for how in ("systemctl restart byokd", "systemctl kill -s KILL byokd") * case.times(1, 5):
        goes_on(guest)
        another_daemon_serves(guest, how)
        expect(not writer.ended(), "the journal ended")
    goes_on(guest)
    longest = max(float(line.split()[3]) for line in guest.run("cat /run/acks").splitlines())
    case.say(f"the longest commit took {longest:.0f} ms")
    expect(longest < LONGEST, f"a commit took {longest:.0f} ms")
    kms.disable(key)
    status, said = writer.wait(timeout=60)
    expect(status != 0, f"it saw no error: {said[-500:]}")
    kms.enable(key)
    guest.until("it serves again", "byokctl status v | grep -q serving")
    guest.run(f"umount /mnt && fsck.ext4 -p {LINK}; mount {LINK} /mnt")
    case.say(guest.run(JOURNAL.format("verify")).strip())
    # And it goes on after what is there.
    writer = guest.start("exec " + JOURNAL.format("append"))
    goes_on(guest)
    guest.run("pkill -f [j]ournal_writer")
    writer.wait()
    case.say(guest.run(JOURNAL.format("verify")).strip())
    guest.run("umount /mnt && udevadm settle && byokctl detach v")


zeebes_journal_goes_on_over_restarts_and_crashes_and_loses_nothing_to_a_denial.time_limit = 600
