#!/usr/bin/env python3
"""Relays connections: relay.py FAMILY WHERE FAMILY WHERE, from the first to the second; tcp PORT or unix PATH."""

import socket
import sys
import threading


def address(family, where):
    return (socket.AF_INET, ("127.0.0.1", int(where))) if family == "tcp" else (socket.AF_UNIX, where)


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        # One end is gone; the other is told by closing.
        source.close()
        sink.close()


family, where = address(*sys.argv[1:3])
listener = socket.socket(family)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(where)
listener.listen(64)
family, where = address(*sys.argv[3:5])
while True:
    near, _ = listener.accept()
    far = socket.socket(family)
    try:
        far.connect(where)
    except OSError:
        near.close()
        continue
    for pair in ((near, far), (far, near)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
