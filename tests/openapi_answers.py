"""Holds answers of the JSON API against its OpenAPI description.

Standard input: one JSON object, {"description": DOCUMENT, "answers": [{"path": .., "status": ..,
"body": ..}]}. The description has to be a valid OpenAPI document; each answer has to fit the schema
of its path and status, and has to have no member that is not described. Standard output: the names of
all schemas that an answer was held against.
"""

import json
import re
import sys

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate


def closed(schema):
    """The schema, with every object closed against members that it does not describe."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    return schema


def operation(description, path):
    path = path.split("?")[0].removeprefix(description["servers"][0]["url"])
    for template, item in description["paths"].items():
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), path):
            return item["get"]
    raise SystemExit(f"{path} is not described")


def main():
    given = json.load(sys.stdin)
    description = given["description"]
    validate(description)
    components = closed(description["components"])
    used = set()
    for answer in given["answers"]:
        responses = operation(description, answer["path"])["responses"]
        content = responses[str(answer["status"])]["content"]
        schema = closed(content["application/json"]["schema"])
        used.add(schema.get("$ref", "").rsplit("/", 1)[-1])
        validator = Draft202012Validator(
            {**schema, "components": components},
            format_checker=Draft202012Validator.FORMAT_CHECKER,
        )
        for error in validator.iter_errors(answer["body"]):
            raise SystemExit(f"{answer['path']}: {error.json_path}: {error.message}")
    print(json.dumps(sorted(used)))


main()
