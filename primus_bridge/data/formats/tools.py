"""Tool definitions and tool calls, as OpenAI's API, Hugging Face's chat templates and ShareGPT data write them."""

from __future__ import annotations

import json
from typing import Any

from primus_bridge.data.formats.fields import from_json, json_value, rows_of, text
from primus_bridge.data.messages import RowError, ToolCall


def definitions(data: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Column tools: a list of definitions, or JSON text of one; null and empty text are none. Kept as they are."""
    value = data.get("tools")
    if isinstance(value, str):
        value = from_json(value, "tools") if value.strip() else None
    out = []
    for i, item in enumerate(rows_of(value or [], "tools", "function definitions")):
        if isinstance(item, str):
            item = from_json(item, f"tools[{i}]")
        if not isinstance(item, dict):
            raise RowError(f"tools[{i}]", f"expected a function definition, found {type(item).__name__}")
        out.append(json_value(item, f"tools[{i}]"))
    return tuple(out)


def calls_of_turn(turn: dict[str, Any], place: str) -> tuple[ToolCall, ...]:
    """An assistant turn's ``tool_calls``, or its ``function_call`` (OpenAI's API before tools)."""
    if value := turn.get("tool_calls"):
        place = f"{place}.tool_calls"
        if isinstance(value, str):
            value = from_json(value, place)
        return tuple(_call(item, f"{place}[{i}]") for i, item in enumerate(rows_of(value, place, "calls")))
    if value := turn.get("function_call"):
        return (_call(value, f"{place}.function_call"),)
    return ()


def calls_of_text(value: Any, place: str) -> tuple[ToolCall, ...]:
    """The content of a ShareGPT function_call turn: JSON of one {name, arguments}, or of a list of them."""
    found = from_json(text(value, place), place)
    if isinstance(found, list) and found:
        return tuple(_call(item, f"{place}[{i}]") for i, item in enumerate(found))
    return (_call(found, place),)


def _call(value: Any, place: str) -> ToolCall:
    """{id, type, function: {name, arguments}}, or {name, arguments}."""
    if not isinstance(value, dict):
        raise RowError(place, f"expected a call {{name, arguments}}, found {type(value).__name__}")
    function, inner = value, place
    if value.get("function") is not None:
        function, inner = value["function"], f"{place}.function"
        if not isinstance(function, dict):
            raise RowError(inner, f"expected {{name, arguments}}, found {type(function).__name__}")
    name = text(function.get("name"), f"{inner}.name")
    if not name:
        raise RowError(f"{inner}.name", "is empty; name the function that is called")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    return ToolCall(
        name, json_value(arguments, f"{inner}.arguments"), text(value.get("id"), f"{place}.id", optional=True)
    )


def _parsed(arguments: str) -> Any:
    """The object that the text holds as JSON; the text itself where it holds none."""
    try:
        value = json.loads(arguments)
    except (json.JSONDecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
