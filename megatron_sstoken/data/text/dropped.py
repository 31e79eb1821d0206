"""What a chat template leaves out of a conversation: looked for in what it wrote."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.text.skeleton import Layout, Piece

Dropped = tuple[str, str]
"""A kind of `recipe.DROPPABLE`, and what it is in words."""


def check_dropped(conversation: Conversation, layout: Layout, recipe: Recipe) -> list[str]:
    """Notes on what the template left out and may leave out. Raises `BadRow` for the rest of it."""
    notes: dict[str, None] = {}  # in order, each once
    for kind, what in dropped(conversation, layout):
        if kind not in recipe.allow_dropped:
            raise BadRow(
                f"the chat template does not write {what}: use a --chat_template that does, or --allow_dropped {kind}"
            )
        notes[f"left out by the chat template, as allowed: {kind}"] = None
    return [*notes, *_arguments_note(conversation, layout)]


def dropped(conversation: Conversation, layout: Layout) -> Iterator[Dropped]:
    """All that the template did not write."""
    written = {id(place.piece) for place in layout.places}
    missing = [piece for piece in layout.marker.pieces if id(piece) not in written]
    # of a call the name; what becomes of arguments is told in a note
    told = set()
    for piece in missing:
        if piece.part != "argument" and (found := _describe(piece, conversation)) not in told:
            told.add(found)
            yield found
    for name in _tool_names(conversation.tools or []):
        if name not in layout.own_text:
            yield "tools", f"the schema of tool {name!r}"


def dropped_without_template(conversation: Conversation) -> Iterator[Dropped]:
    """What plain text cannot say, besides roles."""
    for index, message in enumerate(conversation.messages):
        if message.get("tool_calls"):
            yield "tool_calls", f"message {index}'s tool call"
        if message.get("reasoning_content"):
            yield "reasoning", f"message {index}'s reasoning"
    if conversation.tools:
        yield "tools", "the tools' schemas"


def _describe(piece: Piece, conversation: Conversation) -> Dropped:
    role = conversation.messages[piece.message]["role"]
    if piece.part == "reasoning":
        return "reasoning", f"message {piece.message}'s reasoning"
    if piece.part == "name":
        return "tool_calls", f"message {piece.message}'s tool call"
    return "system" if role == "system" else "content", f"message {piece.message}'s content (role {role})"


def _tool_names(tools: list[dict[str, Any]]) -> list[str]:
    schemas = [tool.get("function", tool) for tool in tools]
    return [schema["name"] for schema in schemas if isinstance(schema, dict) and isinstance(schema.get("name"), str)]


def _arguments_note(conversation: Conversation, layout: Layout) -> list[str]:
    """A note if the template writes a call's name and not all of its arguments."""
    written = {id(place.piece) for place in layout.places}
    pieces = layout.marker.pieces
    named = {(piece.message, piece.call) for piece in pieces if piece.part == "name" and id(piece) in written}
    texts = any(
        piece.part == "argument" and (piece.message, piece.call) in named and id(piece) not in written
        for piece in pieces
    )
    if texts or any(call in named and value not in layout.text for call, value in _numbers(conversation)):
        return ["the chat template leaves out arguments of tool calls"]
    return []


def _numbers(conversation: Conversation) -> Iterator[tuple[tuple[int, int], str]]:
    """Arguments that are numbers: message and call, and the number as JSON has it."""
    for index, message in enumerate(conversation.messages):
        for number, call in enumerate(message.get("tool_calls") or []):
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            for value in arguments.values() if isinstance(arguments, dict) else ():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield (index, number), json.dumps(value)
