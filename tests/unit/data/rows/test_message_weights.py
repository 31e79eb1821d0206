"""What rows say about weights."""

import math

import pytest

from megatron_sstoken.data.conversation import BadRow, MessageWeight
from megatron_sstoken.data.rows.message_weights import learns
from megatron_sstoken.data.rows.messages import parse_messages


def parse(content="a bad answer", role="assistant", **keys):
    (one,) = parse_messages([{"role": role, "content": content, **keys}], "messages")
    assert one.unused == () and one.message == {"role": role, "content": one.message["content"]}
    return one.weight


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale"])
def test_numbers(key):
    assert [parse(**{key: value}) for value in (0, 0.0, 0.25, 1, 3)] == list(map(MessageWeight, (0, 0, 0.25, 1, 3)))
    assert parse(**{key: None}) == MessageWeight()


@pytest.mark.parametrize("key", ["train", "training", "loss"])
def test_switches(key):
    assert (parse(**{key: False}), parse(**{key: True})) == (MessageWeight(0.0), MessageWeight(1.0))


def test_keys_that_agree():
    assert parse(weight=1, train=True, loss_weight=1.0) == MessageWeight(1.0)


def test_spans():
    spans = [{"start": 6, "stop": 12, "weight": 2}, {"start": 2, "stop": 5, "weight": 0}]
    assert parse(spans=spans) == MessageWeight(None, ((1, 5, 0.0), (5, 12, 2.0)))
    assert parse(spans=spans, weight=0.5) == MessageWeight(0.5, ((1, 5, 0.0), (5, 12, 2.0)))
    assert parse(spans=[]) == MessageWeight()


def test_the_space_before_a_word_has_the_weight_of_the_word():
    """Its token holds both."""

    def borders(content, *spans):
        given = [{"start": start, "stop": stop, "weight": 0} for start, stop in spans]
        return [span[:2] for span in parse(content, spans=given).spans]

    assert borders("a bad answer", (2, 5)) == borders("a bad answer", (1, 5)) == [(1, 5)]
    assert borders("a bad answer", (2, 6), (6, 12)) == [(1, 5), (5, 12)]
    assert borders("a  b", (3, 4)) == [(2, 4)], "of several spaces the last"
    assert borders("a\nb\tc", (2, 3), (4, 5)) == [(2, 3), (4, 5)], "other white space has tokens of its own"
    assert borders("ab cd", (1, 5)) == [(1, 5)] and borders(" ab ", (0, 4)) == [(0, 4)]
    assert borders("a b", (1, 2)) == [], "a space alone"


def test_parts_of_thinking():
    parts = [{"type": "thinking", "thinking": "t", "train": False}, {"type": "text", "text": "b", "weight": 2}]
    (one,) = parse_messages([{"role": "assistant", "content": parts}], "messages")
    assert one.weight == MessageWeight(None, ((0, 1, 2.0),), 0.0)
    nested = [{"type": "thinking", "thinking": [{"type": "text", "text": "t", "weight": 0.5}]}, "b"]
    (one,) = parse_messages([{"role": "assistant", "content": nested}], "messages")
    assert one.weight == MessageWeight(thinking=0.5)
    assert learns(MessageWeight(0.0, (), 1.0)) and not learns(MessageWeight(0.0, (), 0.0))


def test_train_detail():
    """axolotl counts the last character in, and trains on nothing that no entry covers."""
    detail = [
        {"begin_offset": 6, "end_offset": 11, "train": True},
        {"begin_offset": 0, "end_offset": 0, "train": False},
    ]
    assert parse(train_detail=detail) == MessageWeight(None, ((0, 1, 0.0), (1, 5, 0.0), (5, 12, 1.0)))
    middle = [{"begin_offset": 2, "end_offset": 4, "train": True}]
    assert parse(train_detail=middle).spans == ((0, 1, 0.0), (1, 5, 1.0), (5, 12, 0.0))


def test_parts():
    parts = [
        {"text": "a ", "weight": 0},
        {"text": ""},
        "bad ",
        {"text": "answer", "train": True},
        {"text": "", "weight": 0},
    ]
    assert parse(parts) == MessageWeight(None, ((0, 1, 0.0), (5, 12, 1.0)))
    assert parse(parts, weight=0.5) == MessageWeight(0.5, ((0, 1, 0.0), (5, 12, 1.0)))


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_others_may_have_weight_zero(role):
    for keys in ({"weight": 0}, {"train": False}, {"spans": [{"start": 0, "stop": 1, "weight": 0}]}):
        assert parse(role=role, **keys) == MessageWeight()
    for keys in ({"weight": 0.5}, {"train": True}, {"spans": [{"start": 0, "stop": 1, "weight": 1}]}):
        with pytest.raises(BadRow, match=f"role {role} has a weight above 0: only the assistant's"):
            parse(role=role, **keys)


def test_what_learns():
    assert [
        learns(MessageWeight(*one)) for one in ((), (1.0,), (0.0,), (0.0, ((0, 1, 0.0),)), (0.0, ((0, 1, 0.5),)))
    ] == [*(True, True, False, False, True)]


SPAN = {"start": 0, "stop": 2, "weight": 1}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"weight": -1}, "`weight` of message 0 must be 0, or from 1e-30 to 1e.30"),
        ({"weight": math.nan}, "must be 0, or from"),
        ({"weight": math.inf}, "must be 0, or from"),
        ({"weight": 1e39}, "must be 0, or from"),
        ({"weight": 1e-46}, "must be 0, or from"),
        ({"weight": 10**4000}, "must be 0, or from"),
        ({"weight": True}, "`weight` of message 0 must be a number, not a boolean"),
        ({"loss_weight": "1"}, "`loss_weight` of message 0 must be a number, not a string"),
        ({"train": 1}, "`train` of message 0 must be true or false, not a number"),
        ({"weight": 1, "train": False}, "`weight` and `train` of message 0 contradict each other"),
        ({"weight": 1, "loss_weight": 0.5}, "`weight` and `loss_weight` of message 0 contradict"),
        ({"spans": {}}, "`spans` of message 0 must be a list of objects"),
        ({"spans": [[0, 1]]}, "must be a list of objects"),
        ({"spans": [{"start": 0, "stop": 2}]}, "`weight` in `spans` of message 0 must be a number, not null"),
        ({"spans": [SPAN | {"start": True}]}, "`start` in .* must be a whole number of characters, not a boolean"),
        ({"spans": [SPAN | {"start": 0.0}]}, "must be a whole number"),
        ({"spans": [SPAN | {"end": 2}]}, "takes start, stop and weight, not 'end'"),
        ({"spans": [SPAN | {"start": 2}]}, "from 2 to 2 .* is empty or outside its 12 characters"),
        ({"spans": [SPAN | {"start": -1}]}, "outside"),
        ({"spans": [SPAN | {"stop": 13}]}, "outside"),
        ({"spans": [SPAN, SPAN | {"start": 1}]}, "overlap at character 1"),
        ({"spans": [SPAN], "train_detail": []}, "more than one of spans, train_detail and weights of parts"),
        ({"spans": [SPAN], "content": [{"text": "abc", "weight": 1}]}, "more than one of"),
        ({"train_detail": []}, "is empty: leave it out"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 12, "train": True}]}, "from 0 to 13"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1}]}, "`train` in .* must be true or false, not null"),
        ({"train": False, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}, "contradict"),
    ],
)
def test_bad_weights_say_why(keys, reason):
    with pytest.raises(BadRow, match=reason):
        parse(**keys)
