"""Volumes between byokd and the kernel's dm-crypt, with file systems and data that both have to see alike."""

from harness.case import expect, plain, start_byokd, volume_key

MAPPED = "/dev/mapper/volume"
# What is on the volumes: many files, sparse ones, large ones, with digests beside them.
FILL = """
    mkdir -p /mnt/data && cd /mnt/data
    for n in $(seq 40); do head -c $((n * 1711)) /dev/urandom >small-$n; done
    head -c 4M /dev/urandom >large
    truncate -s 12M sparse && echo end >>sparse
    sha256sum * >/mnt/digests
    cd / && sync"""
# The bytes at the beginning, in the middle and at the end of a volume.
BYTES = "for at in 0 160 328; do dd if={device} bs=1M count=3 skip=$at status=none; done | sha256sum"
CHECK = "cd /mnt/data && sha256sum --quiet -c /mnt/digests && [ $(ls | wc -l) -eq 42 ]"


def volume(case, name, sector_size=4096):
    """A guest with a disk and a volume on it that byokd made there."""
    kms = case.kms()
    key = kms.key()
    disk = case.disk(name, 352 << 20)
    guest = case.prepared(plain, disks=[f"file={disk},format=raw"])
    start_byokd(guest, kms)
    guest.run(f"""/payload/byokctl volume create {name} --backing /dev/vdc --size 0 --key {key} --purpose zeebe \
        --sector-size {sector_size}""")
    return guest, kms, disk


def byokd_device(guest, name, sector_size):
    """The volume through byokd, as a block device of the kernel's own NBD client."""
    guest.run(f"""/payload/byokctl attach {name}
        nbd-client -unix /run/byokd/nbd/{name}.sock -N {name} -b {sector_size} /dev/nbd0""")
    return "/dev/nbd0"


def dm_crypt_device(guest, disk, kms):
    """The volume through dm-crypt: the key from KMS, and no code of ours in the way."""
    guest.put("/run/volume.key", volume_key(disk, kms), 0o600)
    guest.run("modprobe dm-crypt; cryptsetup open --key-size 512 --volume-key-file /run/volume.key /dev/vdc volume")
    table = guest.run("dmsetup table volume")
    expect("aes-xts-plain64" in table, f"not by dm-crypt: {table}")
    return MAPPED


def leave_byokd(guest, name):
    guest.run(f"nbd-client -d /dev/nbd0; /payload/byokctl detach {name}")


def dm_crypt_reads(case, file_system, sector_size):
    guest, kms, disk = volume(case, "v", sector_size)
    device = byokd_device(guest, "v", sector_size)
    guest.run(f"mkfs.{file_system} -q {device} && mount {device} /mnt && {{ {FILL}\n}} && umount /mnt")
    whole = guest.run(BYTES.format(device=device))
    leave_byokd(guest, "v")
    device = dm_crypt_device(guest, disk, kms)
    expect(guest.run(BYTES.format(device=device)) == whole, "dm-crypt does not see the same bytes")
    guest.run(f"mount {device} /mnt && {CHECK}")
    guest.run("umount /mnt && cryptsetup close volume")
    guest.clean_dmesg()
    guest.shut_down()


def byokd_reads(case, file_system, sector_size):
    guest, kms, disk = volume(case, "v", sector_size)
    device = dm_crypt_device(guest, disk, kms)
    guest.run(f"mkfs.{file_system} -q {device} && mount {device} /mnt && {{ {FILL}\n}} && umount /mnt")
    whole = guest.run(BYTES.format(device=device))
    guest.run("cryptsetup close volume")
    device = byokd_device(guest, "v", sector_size)
    expect(guest.run(BYTES.format(device=device)) == whole, "byokd does not see the same bytes")
    guest.run(f"mount {device} /mnt && {CHECK}")
    # And what byokd changes in it, dm-crypt reads again.
    guest.run("rm /mnt/data/small-7 && cp /mnt/data/large /mnt/copy && sync && umount /mnt")
    leave_byokd(guest, "v")
    device = dm_crypt_device(guest, disk, kms)
    guest.run(f"mount {device} /mnt && cmp /mnt/data/large /mnt/copy && [ ! -e /mnt/data/small-7 ] && umount /mnt")
    guest.run("cryptsetup close volume")
    guest.clean_dmesg()
    guest.shut_down()


def dm_crypt_reads_ext4_that_byokd_wrote(case):
    dm_crypt_reads(case, "ext4", 4096)


def dm_crypt_reads_xfs_that_byokd_wrote_in_sectors_of_512(case):
    dm_crypt_reads(case, "xfs", 512)


def byokd_reads_xfs_that_dm_crypt_wrote(case):
    byokd_reads(case, "xfs", 4096)


def byokd_reads_ext4_that_dm_crypt_wrote_in_sectors_of_512(case):
    byokd_reads(case, "ext4", 512)
