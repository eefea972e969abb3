#!/usr/bin/env python3
"""An independent reader of LUKS2, written from the LUKS2 On-Disk Format Specification and the
kernel's documentation of dm-crypt, and sharing nothing with byokd.

    luks2_independent.py inspect IMAGE
        Both headers, their metadata, and every rule of the format that is broken, as JSON.
    luks2_independent.py decrypt IMAGE KEYFILE [OFFSET LENGTH]
        The plaintext of the data segment to stdout, once the key has passed the digest.

Needs Python 3.9 and `cryptography` (Debian: python3-cryptography).
"""

import base64
import hashlib
import hmac
import json
import re
import struct
import sys

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BINARY = 4096
SIZES = [0x4000 << n for n in range(9)]  # 16 KiB ... 4 MiB
# magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, padding, csum
LAYOUT = ">6sHQQ48s32s64s40s48sQ184s64s"
CSUM_AT = 448
MAGIC = {"primary": b"LUKS\xba\xbe", "secondary": b"SKUL\xba\xbe"}
U64 = re.compile(r"0|[1-9][0-9]{0,19}")


def text(field, name, problems):
    """A NUL-terminated text, whose rest must be NUL too."""
    end = field.find(b"\0")
    if end < 0 or field[end:].strip(b"\0"):
        problems.append(f"{name} is not NUL-terminated text")
    return field[: max(end, 0)].decode("utf-8", "replace")


def read_header(image, which, at):
    """The header copy at `at`, or None, and what is wrong with it."""
    problems = []
    image.seek(at)
    binary = image.read(BINARY)
    if len(binary) < BINARY:
        return None, [f"no {which} header: the image ends"]
    (magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, padding,
     csum) = struct.unpack(LAYOUT, binary[:512])
    if magic != MAGIC[which]:
        return None, [f"no {which} magic at {at}"]
    if version != 2:
        problems.append(f"version {version}")
    if hdr_size not in SIZES:
        return None, problems + [f"hdr_size {hdr_size}"]
    if hdr_offset != at:
        problems.append(f"hdr_offset {hdr_offset}, but it lies at {at}")
    if which == "secondary" and hdr_size != at:
        problems.append("the secondary header does not follow the primary one")
    if padding.strip(b"\0") or binary[512:].strip(b"\0"):
        problems.append("padding is not zero")
    if not salt.strip(b"\0"):
        problems.append("no salt")
    area = image.read(hdr_size - BINARY)
    if len(area) < hdr_size - BINARY:
        return None, problems + ["the JSON area is cut off"]
    algorithm = text(csum_alg, "csum_alg", problems)
    try:
        sum_ = hashlib.new(algorithm)
    except ValueError:
        return None, problems + [f"checksum algorithm {algorithm!r}"]
    sum_.update(binary[:CSUM_AT] + bytes(64) + binary[CSUM_AT + 64 :] + area)
    if csum != sum_.digest().ljust(64, b"\0"):
        problems.append("checksum")
    end = area.find(b"\0")
    if end < 0 or area[end:].strip(b"\0"):
        problems.append("the JSON text is not NUL-terminated, or something follows it")
    header = {
        "hdr_size": hdr_size,
        "seqid": seqid,
        "label": text(label, "label", problems),
        "checksum_algorithm": algorithm,
        "salt": salt.hex(),
        "uuid": text(uuid, "uuid", problems),
        "subsystem": text(subsystem, "subsystem", problems),
        "hdr_offset": hdr_offset,
        "json": area[:end].decode("utf-8", "replace"),
    }
    return header, problems


def check_metadata(meta, hdr_size, device_size):
    """Which rules of the JSON area are broken."""
    problems = []

    def rule(holds, words):
        if not holds:
            problems.append(words)

    def u64(value):
        good = isinstance(value, str) and U64.fullmatch(value) and int(value) < 1 << 64
        return int(value) if good else None

    for name in ("keyslots", "tokens", "segments", "digests", "config"):
        rule(isinstance(meta.get(name), dict), f"no object {name}")
    if problems:
        return problems
    for name in ("keyslots", "tokens", "segments", "digests"):
        for number in meta[name]:
            rule(re.fullmatch(r"0|[1-9][0-9]*", number), f"{name} has an entry {number!r}")

    config = meta["config"]
    json_size, keyslots_size = u64(config.get("json_size")), u64(config.get("keyslots_size"))
    rule(json_size == hdr_size - BINARY, "config.json_size does not fit hdr_size")
    rule(keyslots_size is not None and keyslots_size % 4096 == 0, "config.keyslots_size")
    rule(not config.get("requirements", {}).get("mandatory"), "mandatory requirements")

    areas = []
    for number, slot in meta["keyslots"].items():
        rule(slot.get("type") == "luks2", f"keyslot {number}: type")
        rule(isinstance(slot.get("key_size"), int), f"keyslot {number}: key_size")
        offset, size = (u64(slot.get("area", {}).get(n)) for n in ("offset", "size"))
        rule(offset is not None and size is not None, f"keyslot {number}: area")
        if offset is not None and size is not None and keyslots_size is not None:
            inside = 2 * hdr_size <= offset and offset + size <= 2 * hdr_size + keyslots_size
            rule(inside, f"keyslot {number}: its area lies outside the keyslots area")
            areas.append((offset, offset + size))
    areas.sort()
    rule(all(a[1] <= b[0] for a, b in zip(areas, areas[1:])), "keyslot areas overlap")

    rule(len(meta["segments"]) > 0, "no segment")
    for number, segment in meta["segments"].items():
        rule(segment.get("type") == "crypt", f"segment {number}: type")
        offset = u64(segment.get("offset"))
        size = segment.get("size")
        rule(offset is not None, f"segment {number}: offset")
        rule(size == "dynamic" or u64(size) is not None, f"segment {number}: size")
        rule(u64(segment.get("iv_tweak")) is not None, f"segment {number}: iv_tweak")
        rule(isinstance(segment.get("encryption"), str), f"segment {number}: encryption")
        sector = segment.get("sector_size")
        rule(sector in (512, 1024, 2048, 4096), f"segment {number}: sector_size")
        if offset is not None and keyslots_size is not None and sector:
            rule(offset >= 2 * hdr_size + keyslots_size, f"segment {number}: begins in the header")
            rule(offset % 512 == 0, f"segment {number}: offset is not aligned")
            end = device_size if size == "dynamic" else offset + (u64(size) or 0)
            rule(offset < end <= device_size, f"segment {number}: the device is too small")
            rule((end - offset) % sector == 0, f"segment {number}: not whole sectors")

    for number, digest in meta["digests"].items():
        rule(digest.get("type") == "pbkdf2", f"digest {number}: type")
        rule(digest.get("hash") in hashlib.algorithms_available, f"digest {number}: hash")
        rule(isinstance(digest.get("iterations"), int), f"digest {number}: iterations")
        for name in ("salt", "digest"):
            try:
                base64.b64decode(digest.get(name, "?"), validate=True)
            except (ValueError, TypeError):
                problems.append(f"digest {number}: {name}")
        rule(set(digest.get("keyslots", "?")) <= set(meta["keyslots"]), f"digest {number}: keyslots")
        rule(set(digest.get("segments", "?")) <= set(meta["segments"]), f"digest {number}: segments")
    for kind in ("keyslots", "segments"):
        for number in meta[kind]:
            count = sum(number in digest.get(kind, []) for digest in meta["digests"].values())
            rule(count == 1, f"{kind} {number} has {count} digests")

    for number, token in meta["tokens"].items():
        rule(isinstance(token.get("type"), str), f"token {number}: type")
        rule(isinstance(token.get("keyslots"), list), f"token {number}: keyslots")
        rule(set(token.get("keyslots", "?")) <= set(meta["keyslots"]), f"token {number}: keyslots")
    return problems


def inspect(image):
    image.seek(0, 2)
    device_size = image.tell()
    primary, problems = read_header(image, "primary", 0)
    problems = [f"primary: {p}" for p in problems]
    secondary = None
    if primary:
        secondary, found = read_header(image, "secondary", primary["hdr_size"])
        problems += [f"secondary: {p}" for p in found]
    metadata = None
    if primary:
        try:
            metadata = json.loads(primary["json"])
        except ValueError as error:
            problems.append(f"metadata: {error}")
        else:
            found = check_metadata(metadata, primary["hdr_size"], device_size)
            problems += [f"metadata: {p}" for p in found]
    if primary and secondary:
        for name in ("hdr_size", "seqid", "label", "checksum_algorithm", "uuid", "subsystem", "json"):
            if primary[name] != secondary[name]:
                problems.append(f"the copies differ in {name}")
        if primary["salt"] == secondary["salt"]:
            problems.append("both copies have the same salt")
    return {
        "primary": primary,
        "secondary": secondary,
        "metadata": metadata,
        "device_size": device_size,
        "problems": problems,
    }


def check_key(metadata, key):
    """Holds the volume key to the digest of segment 0."""
    digest = next(d for d in metadata["digests"].values() if "0" in d["segments"])
    expected = base64.b64decode(digest["digest"])
    salt = base64.b64decode(digest["salt"])
    made = hashlib.pbkdf2_hmac(digest["hash"], key, salt, digest["iterations"], len(expected))
    if not hmac.compare_digest(made, expected):
        sys.exit("this is not the volume key: its digest differs")


def decrypt(image, key, start, length, out):
    found = inspect(image)
    if found["problems"]:
        sys.exit("\n".join(found["problems"]))
    segment = found["metadata"]["segments"]["0"]
    if segment["encryption"] != "aes-xts-plain64" or len(key) != 64:
        sys.exit(f"only aes-xts-plain64 with a 64-byte key, not {segment['encryption']}")
    check_key(found["metadata"], key)
    offset, sector = int(segment["offset"]), segment["sector_size"]
    size = segment["size"]
    size = found["device_size"] - offset if size == "dynamic" else int(size)
    length = size - start if length is None else length
    if start % sector or length % sector or start + length > size:
        sys.exit(f"only whole sectors within the segment's {size} bytes")
    image.seek(offset + start)
    # plain64: the number of the sector as 64 bits, little-endian, zero-extended to the block.
    # dm-crypt counts it in units of 512 bytes whatever the sector size, unless the segment was
    # made with `iv_large_sectors`, which LUKS2 has no field for.
    number = int(segment["iv_tweak"]) + start // 512
    for _ in range(length // sector):
        iv = struct.pack("<QQ", number, 0)
        cipher = Cipher(algorithms.AES(key), modes.XTS(iv)).decryptor()
        out.write(cipher.update(image.read(sector)) + cipher.finalize())
        number += sector // 512


def main(args):
    if len(args) == 2 and args[0] == "inspect":
        with open(args[1], "rb") as image:
            json.dump(inspect(image), sys.stdout)
    elif len(args) in (3, 5) and args[0] == "decrypt":
        with open(args[2], "rb") as file:
            key = file.read()
        start, length = (int(args[3]), int(args[4])) if len(args) == 5 else (0, None)
        with open(args[1], "rb") as image:
            decrypt(image, key, start, length, sys.stdout.buffer)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
