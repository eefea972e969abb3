"""An OpenTelemetry collector of logs, as far as the tests need one.

Listens on a port of 127.0.0.1 that it writes first, on a line of its own. Each request is decoded by
OpenTelemetry's own description, and each log record in it written as a line of JSON: body, severity,
target, attributes, and the attributes of its resource.
"""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)


def value(any_value):
    kind = any_value.WhichOneof("value")
    return getattr(any_value, kind) if kind else None


def attributes(pairs):
    found = {pair.key: value(pair.value) for pair in pairs}
    assert len(found) == len(pairs), f"a name comes twice: {pairs}"
    return found


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/logs", self.path
        assert self.headers["Content-Type"] == "application/x-protobuf", self.headers
        request = ExportLogsServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    told = {
                        "body": value(record.body),
                        "severity": record.severity_text,
                        "number": record.severity_number,
                        "time": record.time_unix_nano,
                        "scope": scope.scope.name,
                        "attributes": attributes(record.attributes),
                        "resource": attributes(resource.resource.attributes),
                        "token": self.headers["Authorization"],
                    }
                    print(json.dumps(told), flush=True)
        answer = ExportLogsServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Collector)
print(server.server_port, flush=True)
server.serve_forever()
