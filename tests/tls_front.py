#!/usr/bin/python3
"""A TLS end in front of a TCP port of this machine, as AWS's endpoints have one.

tls_front.py DIR PORT: makes a certificate authority and a certificate for localhost, writes the authority to
DIR/ca.pem, listens, writes its own port to DIR/port, and passes bytes both ways until it is ended.
"""

import datetime
import pathlib
import socket
import ssl
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def named(name):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def certificate(subject, public, issuer, signer, authority):
    now = datetime.datetime.utcnow()
    return (
        x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(issuer)).public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(signer, hashes.SHA256())
    )


def pass_on(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def main():
    place, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    signer, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    ca = certificate("test authority", signer.public_key(), "test authority", signer, True)
    leaf = certificate("localhost", own.public_key(), "test authority", signer, False)
    (place / "ca.pem").write_bytes(ca.public_bytes(pem))
    (place / "leaf.pem").write_bytes(leaf.public_bytes(pem) + own.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "leaf.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    (place / "port.new").write_text(str(listener.getsockname()[1]))
    (place / "port.new").rename(place / "port")
    while True:
        client, _ = listener.accept()
        try:
            secured = context.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", port))
        except OSError:
            continue
        for ends in ((secured, server), (server, secured)):
            threading.Thread(target=pass_on, args=ends, daemon=True).start()


main()
