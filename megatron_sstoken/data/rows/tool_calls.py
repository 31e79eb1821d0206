"""Tool calls and tool schemas, in the forms that people write → the form that chat templates read."""

from typing import Any

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.rows.row_values import check_json, decode_json, decoded, is_empty, kind, without_nulls


def parse_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Calls → `[{"type": "function", "function": {"name", "arguments": {…}}, …}]`.

    Takes one call or a list of them, as objects or as JSON text; a call is OpenAI's object or flat: name and
    arguments (or `parameters`, as Llama 3.1 writes them). Arguments may be JSON text. Raises `BadRow`.
    """
    value = decoded(value, what)
    calls = value if isinstance(value, list) else [value]
    return [_parse_call(decoded(call, what), what) for call in calls]


def parse_tools(value: Any, what: str) -> list[dict[str, Any]] | None:
    """Schemas → `[{"type": "function", "function": {"name", …}}, …]`, or None where there are none.

    Takes a list of objects or of JSON texts, or one JSON text for all; each with or without the wrapper. Raises
    `BadRow`.
    """
    if is_empty(value) or is_empty(value := decoded(value, what)):
        return None
    if not isinstance(value, list):
        raise BadRow(f"{what} must be a list of tool schemas, not {kind(value)}")
    return [_parse_tool(decoded(tool, what), what) for tool in value]


def _parse_call(call: Any, what: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRow(f"{what} must hold calls as objects, not {kind(call)}")
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise BadRow(f"`function` of {what} must be an object, not {kind(function)}")
    if not isinstance(name := function.get("name"), str) or not name:
        raise BadRow(f"{what} must name the function that is called: `name` is missing or no text")
    if call.get("type", "function") != "function":
        raise BadRow(f"{what} calls something of type {call['type']!r}; only functions are supported")
    key = "arguments" if function.get("arguments") is not None else "parameters"
    arguments = _parse_arguments(function.get(key), f"`{key}` of {what}")
    outer = {key: value for key, value in call.items() if key not in ("type", "function")}
    if function is call:
        outer = {key: value for key, value in outer.items() if key not in ("name", "arguments", "parameters")}
        return {**outer, "type": "function", "function": {"name": name, "arguments": arguments}}
    inner = {name: value for name, value in function.items() if value is not None and name != key}
    return {**outer, "type": "function", "function": {**inner, "arguments": arguments}}


def _parse_arguments(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str) and value.strip():
        arguments = decode_json(value, f"{what} is not JSON")  # what the model said: its nulls stay
    else:
        arguments = {} if value is None or isinstance(value, str) else without_nulls(value)
    if not isinstance(arguments, dict):
        raise BadRow(f"{what} must be an object of named arguments, not {kind(arguments)}")
    check_json(arguments, what)
    return arguments


def _parse_tool(tool: Any, what: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadRow(f"{what} must hold tool schemas as objects, not {kind(tool)}")
    tool = without_nulls(tool)
    if not isinstance(function := tool.get("function", tool), dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{what} must hold schemas of functions, each with a `name`")
    if tool.get("type", "function") != "function":
        raise BadRow(f"{what} has a tool of type {tool['type']!r}; only functions are supported")
    check_json(tool, what)
    if "parameters" not in function and "input_schema" in function:  # Anthropic's name
        function["parameters"] = function.pop("input_schema")
    if function is tool:
        return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    return {"type": "function"} | tool
