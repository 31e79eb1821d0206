"""The JSON schema of a YAML file with settings, made from the dataclasses: editors complete, check and explain by it.

Its dialect is what the YAML language server of VS Code and others reads, JSON Schema draft 7.
"""

import json
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron_sstoken.config.catalogue import Entry, entries, sections
from megatron_sstoken.config.model import ALL_LINEAR

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}


def schema() -> dict[str, Any]:
    """The schema as a mapping. Sections may be empty, and no section or setting is allowed that does not exist."""
    properties = {
        section: {
            "description": about,
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {one.key: _schema_of(one) for one in entries().values() if one.section == section},
        }
        for section, about in sections().items()
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Settings of megatron_sstoken",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def schema_text() -> str:
    """The schema as JSON."""
    return json.dumps(schema(), indent=2, ensure_ascii=False)


def _schema_of(entry: Entry) -> dict[str, Any]:
    kinds = [_schema_of_type(one) for one in entry.alternatives]
    if get_origin(entry.type) is list and "enum" in kinds[0]["items"]:  # words, as in PEFT
        kinds.append({"const": ALL_LINEAR})
    told = {"description": entry.doc.replace("\n", "\n\n"), "default": entry.default}
    return told | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _schema_of_type(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is list:
        return {"type": "array", "items": _schema_of_type(get_args(kind)[0])}
    return {"type": _TYPES[kind]}
