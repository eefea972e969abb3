"""Searches a daemon's whole memory for a volume key, its parts, the round keys made of it, and for plaintext."""

import json
import subprocess
import sys


def sbox():
    def times(a, b):
        product = 0
        while b:
            product ^= a if b & 1 else 0
            a = (a << 1) ^ (0x11B if a & 0x80 else 0)
            b >>= 1
        return product

    table = []
    for n in range(256):
        inverse = next((m for m in range(256) if times(n, m) == 1), 0)
        value = 0x63
        for turn in range(5):
            value ^= ((inverse << turn) | (inverse >> (8 - turn))) & 0xFF
        table.append(value)
    return table


SBOX = sbox()


def round_keys(key):
    """AES-256's, by FIPS 197, section 5.2: fifteen of sixteen bytes, the first two of them the key."""
    words = [key[n : n + 4] for n in range(0, 32, 4)]
    factor = 1
    while len(words) < 60:
        word = words[-1]
        if len(words) % 8 == 0:
            word = bytes(SBOX[b] for b in word[1:] + word[:1])
            word = bytes([word[0] ^ factor]) + word[1:]
            factor <<= 1
        elif len(words) % 8 == 4:
            word = bytes(SBOX[b] for b in word)
        words.append(bytes(a ^ b for a, b in zip(words[-8], word)))
    return [b"".join(words[n : n + 4]) for n in range(0, 60, 4)]


assert round_keys(bytes(range(32)))[14].hex() == "24fc79ccbf0979e9371ac23c6d68de36", "FIPS 197, appendix C.3"


def found(pid, needles):
    """Which of these byte strings are in the memory of `pid`. Another process searches, for a search keeps the
    threads of this one waiting."""
    told = json.dumps(dict(pid=pid, needles=[needle.hex() for needle in needles]))
    done = subprocess.run([sys.executable, __file__], input=told, stdout=subprocess.PIPE, check=True, text=True)
    return [bytes.fromhex(needle) for needle in json.loads(done.stdout)]


def of_key(key):
    """The pieces of `key`, 64 bytes, to search for. Round keys lie side by side: the first and the last ones give a
    schedule away."""
    return [keys[n] for keys in (round_keys(key[:32]), round_keys(key[32:])) for n in (0, 1, 2, 13, 14)]


def pieces(pid, overlap):
    """All that can be read of the memory of `pid`, in pieces that begin with the end of the one before."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if not rights.startswith("r") or line.rstrip().endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                continue
            at, end = (int(text, 16) for text in span.split("-"))
            while at < end:
                try:
                    memory.seek(at)
                    data = memory.read(min(end - at, 16 << 20))
                except OSError:
                    # The ring's own pages are the kernel's.
                    data = b""
                yield data
                at += len(data) - overlap if len(data) > 4096 and at + len(data) < end else len(data) or 4096


def main():
    told = json.load(sys.stdin)
    needles = {bytes.fromhex(needle) for needle in told["needles"]}
    there = set()
    for data in pieces(told["pid"], overlap=max(map(len, needles)) - 1):
        there |= {needle for needle in needles - there if needle in data}
    print(json.dumps([needle.hex() for needle in there]))


if __name__ == "__main__":
    main()
