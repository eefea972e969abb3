"""The customer's key service: the development KMS on the host, out of the guest's reach but for the network."""

import json
import pathlib
import subprocess
import urllib.error
import urllib.request

from . import process
from .waiting import Failed, wait_for


class Kms:
    """A development KMS of a test's own."""

    def __init__(self, place, log, programs):
        self.place, self.programs = pathlib.Path(place), programs
        self.place.mkdir(parents=True)
        self.log = open(log, "a")
        self.process = process.start([programs / "byokd", "--dev", "--state-dir", self.place], stdout=self.log,
                                     stderr=self.log)
        # The control socket comes last.
        files = [self.place / name for name in ("byokd.sock", "kms-endpoint")]
        try:
            wait_for(lambda: all(file.exists() for file in files), "the development KMS runs", 60, of=self.process)
        except Failed as failure:
            raise Failed(f"{failure}\n{log.read_text()}") from None
        self.url = (self.place / "kms-endpoint").read_text().strip()

    @property
    def port(self):
        return int(self.url.rsplit(":", 1)[1])

    def key(self):
        """A new key's ARN."""
        return self.ctl("create")["key_arn"]

    def disable(self, key):
        self.ctl("disable", key)

    def enable(self, key):
        self.ctl("enable", key)

    def ctl(self, *words):
        done = subprocess.run([self.programs / "byokctl", "--json", "dev", "key", *words, "--state-dir", self.place],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"byokctl dev key {words}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout)

    def fault(self, **fault):
        """Something that no KMS offers; docs/dev-kms.md lists them."""
        self.request("POST", "/_dev/faults", json.dumps(fault).encode())

    def no_faults(self):
        self.request("DELETE", "/_dev/faults")

    def decrypt(self, blob, context):
        """What a wrapped key holds, by AWS's own wire protocol: base64 in and out."""
        body = json.dumps({"CiphertextBlob": blob, "EncryptionContext": context}).encode()
        headers = {"X-Amz-Target": "TrentService.Decrypt", "Content-Type": "application/x-amz-json-1.1",
                   "Authorization": "AWS4-HMAC-SHA256 Credential=test/20250101/eu-central-1/kms/aws4_request"}
        return json.loads(self.request("POST", "/", body, headers))["Plaintext"]

    def request(self, method, path, body=None, headers=None):
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Failed(f"KMS: {method} {path}: {error} {error.read()}") from None

    def end(self):
        process.end(self.process)
