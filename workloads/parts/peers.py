"""What byokd is compared with: the same file served by nbdkit, in clear and as LUKS."""

from .shell import Process, run, until

# What cryptsetup leaves before the data of a LUKS1 device.
LUKS1_HEADER = 2 << 20


def serve_clear(stack, name, scratch, image, log):
    """Serves a file as it is; gives its URI."""
    return serve(stack, name, scratch, ["file", image], log)


def nbdkit(stack, name, scratch, size, log):
    """Serves a new file; gives its URI. nbdkit goes through the page cache, as it does by itself; byokd bypasses it."""
    image = scratch / f"{name}.img"
    with open(image, "wb") as file:
        file.truncate(size + (LUKS1_HEADER if name == "nbdkit-luks" else 0))
    if name == "nbdkit-luks":
        secret = scratch / "passphrase"
        secret.write_text("passphrase")
        # The filter reads LUKS1 only. Iterations are about passphrases, not about the speed of data.
        run("/usr/sbin/cryptsetup", "luksFormat", "--type", "luks1", "--batch-mode", "--cipher", "aes-xts-plain64", "--key-size", "512",
            "--pbkdf-force-iterations", "1000", image, secret)
        return serve(stack, name, scratch, ["--filter=luks", "file", image, f"passphrase=+{secret}"], log)
    return serve_clear(stack, name, scratch, image, log)


def serve(stack, name, scratch, what, log):
    socket = scratch / f"{name}.sock"
    socket.unlink(missing_ok=True)
    server = Process(stack, ["nbdkit", "-f", "-U", socket, *what], log)
    until(f"{name} listens", lambda: socket.exists() or server.ended())
    return f"nbd+unix:///?socket={socket}"
