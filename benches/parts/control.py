"""byokd's control socket, and the daemons of a bench."""

import json
import os
import socket
import subprocess
import time


def ask(path, request, **arguments):
    """One request, one answer."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(60)
        control.connect(str(path))
        control.sendall(json.dumps({"request": request, **arguments}).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = control.recv(1 << 20)
            if not more:
                raise ConnectionResetError("the daemon ended")
            answer += more
    return json.loads(answer)


class Failed(Exception):
    """The daemon refused what a bench cannot do without."""


def must(path, request, **arguments):
    answer = ask(path, request, **arguments)
    if answer["answer"] == "error":
        raise Failed(f"{request} {arguments}: {answer['why']}; {answer['remedy']}")
    return answer


def listens(path):
    try:
        ask(path, "version")
        return True
    except OSError:
        return False


def start_kms(byokd, state, log):
    """A daemon that is nothing but its development KMS. Gives the process and KMS's port."""
    process = subprocess.Popen([byokd, "--dev", "--state-dir", state], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    wait_for(lambda: listens(state / "byokd.sock"), process)
    return process, int((state / "kms-endpoint").read_text().strip().rsplit(":", 1)[1])


def settings(place, port, more):
    """byokd.toml of a daemon under that KMS, with everything in one directory."""
    (place / "volumes.d").mkdir(exist_ok=True)
    (place / "byokd.toml").write_text(
        f'volumes_dir = "{place}/volumes.d"\ncontrol_socket = "{place}/byokd.sock"\nnbd_dir = "{place}/nbd"\n{more[0]}'
        f'[audit]\ndirectory = "{place}/audit"\n'
        f'[kms]\nregion = "eu-central-1"\nendpoint = "http://127.0.0.1:{port}"\n{more[1]}[lease]\n{more[2]}')


def start(byokd, place, log):
    """A daemon as in production, by `settings`."""
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "dev", "AWS_SECRET_ACCESS_KEY": "dev"}
    process = subprocess.Popen([byokd, "--config", place / "byokd.toml"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    wait_for(lambda: listens(place / "byokd.sock"), process)
    return process


def wait_for(so, process, seconds=30):
    deadline = time.monotonic() + seconds
    while not so():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{process.args[0]} did not start; see its log")
        time.sleep(0.02)


def held(process):
    """What a process holds: descriptors, threads, MiB of memory."""
    fields = dict(line.split(":", 1) for line in open(f"/proc/{process.pid}/status"))
    return dict(descriptors=len(os.listdir(f"/proc/{process.pid}/fd")), threads=int(fields["Threads"]), mib=int(fields["VmRSS"].split()[0]) / 1024)
