"""The customer's console: straight to the development KMS."""

import http.client
import json


class Console:
    """Does what customers do to keys, and what no KMS offers: trouble on demand."""

    def __init__(self, port):
        self.port = port

    def call(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body), headers=headers or {})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"KMS: {text!r}")
        return json.loads(text or b"{}")

    def do(self, operation, **arguments):
        return self.call("POST", "/", arguments, {"X-Amz-Target": f"TrentService.{operation}", "Authorization": "none is checked",
                                               "Content-Type": "application/x-amz-json-1.1"})

    def trouble(self, **fault):
        self.call("POST", "/_dev/faults", fault)

    def no_trouble(self):
        self.call("DELETE", "/_dev/faults")

    def allow_but(self, key, volume=None):
        """The key's policy: everything, but nothing for this volume."""
        statements = [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"}]
        if volume:
            statements.append({"Effect": "Deny", "Principal": {"AWS": "*"}, "Action": "kms:Decrypt", "Resource": "*",
                               "Condition": {"StringEquals": {"kms:EncryptionContext:byokd:volume-uuid": volume}}})
        self.do("PutKeyPolicy", KeyId=key, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))

    def requests(self):
        """The latest requests that KMS got, oldest first."""
        return self.call("GET", "/_dev/requests")["requests"]
