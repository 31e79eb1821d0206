"""What a conversation says is found in the template's text, character for character."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.text.skeleton import MARKUP, lay_out


def write(messages):
    """A template: trims contents, writes reasoning, and the arguments of calls as JSON."""
    from json import dumps

    text = ""
    for message in messages:
        calls = "".join(dumps(call["function"]) for call in message.get("tool_calls", []))
        text += f"[{message['role']}]{message.get('reasoning_content', '')}|{message['content'].strip()}|{calls}\n"
    return text


texts = st.text(max_size=20) | st.sampled_from(
    ["Xq0Z", "<think>a</think> b", '"\\', " \n ", "[user]", "/no_think", "|"]
)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4))
def test_every_piece_is_found(triples):
    messages = [
        {
            "role": "assistant",
            "content": content,
            "reasoning_content": reasoning,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": [argument, 1]}}}],
        }
        for content, reasoning, argument in triples
    ]
    layout = lay_out(messages, write(messages), write)
    assert layout.skeleton is not None and len(layout.places) == len(layout.marker.pieces)
    for place in layout.places:
        if place.exact:
            assert layout.text[place.start : place.stop] == place.piece.text
        if (start := place.piece.content_start) is not None:
            content = messages[place.piece.message]["content"]
            assert content[start : start + len(place.piece.text)] == place.piece.text
        assert layout.to_text(place.mark_start) == place.start and layout.to_text(place.mark_stop) == place.stop
    for index, message in enumerate(messages):  # all but whitespace and markup is in some piece
        pieces = [piece for piece in layout.marker.pieces if piece.message == index and piece.content_start is not None]
        left = message["content"]
        for piece in reversed(pieces):
            left = left[: piece.content_start] + left[piece.content_start + len(piece.text) :]
        assert not MARKUP.pattern.sub("", left).strip()


def test_pieces_left_out_have_no_place():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    layout = lay_out(messages, "a:b", lambda given: ":".join(message["content"] for message in given))
    assert [place.piece.text for place in layout.places] == ["a", "b"]
    assert [piece.part for piece in layout.marker.pieces] == ["content", "content", "reasoning"]


def test_a_template_that_depends_on_contents_is_searched():
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]

    def shout(given):
        return " ".join(f"{len(message['content'])} {message['content']}" for message in given)

    layout = lay_out(messages, shout(messages), shout)
    assert layout.skeleton is None and [place.start for place in layout.places] == [2, 8]
