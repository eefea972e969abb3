"""byokd as systemd runs it: its units, and a boot with volumes in fstab."""

from harness.case import expect
from harness.service import LINK, served


def the_units_are_sound_and_the_daemon_is_confined(case):
    guest, _, _ = served(case)
    said = guest.run("""systemd-analyze verify --man=no /etc/systemd/system/byokd.service \
        /etc/systemd/system/byokd-kernel.service /etc/systemd/system/byokd-kernel.socket byokd-attach@v.service""")
    expect(said.strip() == "", f"systemd-analyze verify: {said}")
    # In tenths: 2.0. It exits with an error above that.
    said = guest.run("systemd-analyze security --no-pager --offline=true --threshold=20 /etc/systemd/system/byokd.service | tail -1")
    case.say(said.strip())
    # And what runs is as the unit says: a user of its own, no capability, no new one, a filter.
    status = guest.run("cat /proc/$(systemctl show -p MainPID --value byokd)/status")
    facts = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    user = guest.run("id -u byokd").strip()
    expect(set(facts["Uid"].split()) == {user}, f"runs as {facts['Uid']}")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        expect(int(facts[name], 16) == 0, f"{name} is {facts[name]}")
    expect(facts["NoNewPrivs"].strip() == "1" and facts["Seccomp"].strip() == "2", "no_new_privs and a filter")


MOUNT_UNIT = f"""\
[Unit]
Requires=byokd-attach@v.service
After=byokd-attach@v.service
[Mount]
What={LINK}-part2
Where=/more
Options=_netdev
[Install]
WantedBy=remote-fs.target
"""


def volumes_in_fstab_are_there_after_a_reboot(case):
    guest, _, _ = served(case, definition='device = "auto"')
    guest.put("/etc/systemd/system/more.mount", MOUNT_UNIT)
    guest.run(f"""
        sed -i 's/^attach = .*/attach = "auto"/' /etc/byokd/volumes.d/v.toml
        systemctl enable -q byokd byokd-kernel.socket
        systemctl restart byokd && udevadm wait --timeout=60 {LINK}
        printf ',96M\\n,\\n' | sfdisk -q {LINK} && udevadm wait --settle --timeout=60 {LINK}-part1 {LINK}-part2
        mkfs.ext4 -q {LINK}-part1 && mkfs.ext4 -q {LINK}-part2 && mkdir -p /data /more
        echo "{LINK}-part1 /data ext4 _netdev,x-systemd.requires=byokd-attach@v.service 0 2" >/etc/fstab
        systemctl daemon-reload && systemctl enable -q more.mount
        systemctl start data.mount more.mount && findmnt /data && findmnt /more
        echo one >/data/file && echo two >/more/file""")
    for _ in range(case.times(1, 3)):
        guest.reboot()
        guest.until("both are mounted", "findmnt /data >/dev/null && findmnt /more >/dev/null")
        guest.run("grep one /data/file && grep two /more/file")
        guest.run("systemctl is-active byokd byokd-attach@v data.mount more.mount")
        # They had been unmounted before the daemon went.
        expect("recovery complete" not in guest.dmesg(), "a journal had to be replayed")
        # A restart is none of what is mounted.
        guest.run("""before=$(systemctl show -p ActiveEnterTimestampMonotonic data.mount)
            systemctl restart byokd && sync -f /data && findmnt /data &&
            [ "$before" = "$(systemctl show -p ActiveEnterTimestampMonotonic data.mount)" ]""")
        guest.clean_dmesg()


volumes_in_fstab_are_there_after_a_reboot.time_limit = 900
