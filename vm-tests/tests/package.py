"""The Debian package: installed, upgraded under load with its volume mounted, removed."""

from harness.case import expect
from harness.service import LINK, another_daemon_serves, check_syncs, end_load, goes_on, load, record_syncs, settings


def the_debian_package_installs_upgrades_under_load_and_removes(case):
    kms = case.kms()
    key = kms.key()
    guest = case.guest(systemd=True).boot()
    guest.run("dpkg -i /payload/byokd_1.deb", timeout=300)
    guest.run("systemctl is-enabled byokd byokd-kernel.socket && systemctl is-active byokd-kernel.socket && lsmod | grep -qw nbd")
    settings(guest, kms)
    guest.run("systemctl start byokd")
    guest.run(f"""byokctl volume create v --backing /var/lib/byokd/v.img --size 192M --key {key} --purpose zeebe
        byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt""")
    syncs, running = record_syncs(guest), load(guest, 100000)
    goes_on(guest)
    # The settings are the administrator's, and stay.
    another_daemon_serves(guest, "dpkg -i --force-confold /payload/byokd_2.deb")
    expect(guest.run("dpkg-query -W -f '${Version}' byokd") == "2", "upgraded")
    goes_on(guest)
    expect(not running.ended() and not syncs.ended(), "the load ended")
    end_load(guest, running)
    case.say(check_syncs(guest).strip())
    status, said = guest.attempt("dpkg -r byokd", timeout=300)
    expect(status != 0 and "byokctl detach" in said, f"removed with a volume attached: {said}")
    guest.run("systemctl is-active byokd && sync -f /mnt")
    guest.run("umount /mnt && udevadm settle && byokctl detach v && dpkg -r byokd", timeout=300)
    guest.run("! systemctl is-active byokd byokd-kernel.socket && [ ! -e /usr/bin/byokd ] && [ -e /var/lib/byokd/v.img ]")
    # Installed again, it is as it was: enabled, and it finds its volume.
    guest.run("dpkg -i /payload/byokd_2.deb && systemctl is-enabled byokd byokd-kernel.socket && systemctl is-active byokd-kernel.socket",
              timeout=300)
    guest.run(f"systemctl start byokd && byokctl attach v --device auto && mount {LINK} /mnt && umount /mnt")
    guest.run("udevadm settle && byokctl detach v && dpkg --purge byokd && [ -e /var/lib/byokd/v.img ]", timeout=300)
    guest.run("! systemctl is-enabled byokd 2>/dev/null && ! ls /etc/systemd/system/*.wants/byokd*")
    # In an image that is being made no systemd runs: enabled all the same, and nothing is started.
    guest.run("""cp /payload/byokd_2.deb /root; mount --bind / /mnt; mount --bind /dev /mnt/dev; mount -t proc proc /mnt/proc
        chroot /mnt dpkg -i /root/byokd_2.deb; umount /mnt/proc /mnt/dev /mnt
        systemctl is-enabled byokd byokd-kernel.socket && ! systemctl is-active byokd-kernel.socket""", timeout=300)
    guest.clean_dmesg(allowed=("Connection timed out, retrying",))


the_debian_package_installs_upgrades_under_load_and_removes.time_limit = 900
