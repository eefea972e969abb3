#!/bin/sh
# Installs what looks at the console and the JSON API, for tests/it/console.rs and tests/it/api.rs: a
# driver for Chromium, axe's accessibility rules, and validators of OpenAPI and JSON Schema. Into
# ${BYOKD_TEST_TOOLS:-target/test-tools}/browser; what is there already stays. Chromium itself is one
# of the Debian packages.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=${BYOKD_TEST_TOOLS:-$here/../../target/test-tools}
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)/browser

wanted="selenium==4.51.0 jsonschema==4.26.0 rfc3339-validator==0.1.4 openapi-spec-validator==0.9.0"
# Of this one only the rules are used, not what would drive a browser of its own.
rules="axe-playwright-python==0.1.8"

if [ "$(cat "$tools/version" 2>/dev/null)" = "$wanted $rules" ]; then
    echo "browser: there already"
    exit 0
fi
rm -rf "$tools"
python3 -m venv "$tools"
# shellcheck disable=SC2086 # Several words.
"$tools/bin/pip" install --quiet --disable-pip-version-check $wanted
"$tools/bin/pip" install --quiet --disable-pip-version-check --no-deps "$rules"
echo "$wanted $rules" >"$tools/version"
echo "browser: installed"
