#!/bin/sh
# Installs OpenTelemetry's own description of its wire format, in Python, for tests/otlp_collector.py.
# Into ${BYOKD_TEST_TOOLS:-target/test-tools}/collector; what is there already stays.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=${BYOKD_TEST_TOOLS:-$here/../../target/test-tools}
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)/collector

wanted="opentelemetry-proto==1.45.2"

if [ "$(cat "$tools/version" 2>/dev/null)" = "$wanted" ]; then
    echo "collector: there already"
    exit 0
fi
rm -rf "$tools"
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check "$wanted"
echo "$wanted" >"$tools/version"
echo "collector: installed"
