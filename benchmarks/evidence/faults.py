"""Faults put into GSM8K's answers at known places: each is a span of characters that is noise, all else stays clean."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]
"""First character and the one after the last."""

_CALCULATION = re.compile(r"<<[^>]*>>")
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"[A-Za-z]{3,}")
_BEFORE = (
    "Sure! As a helpful assistant, I would be happy to assist you with this question. ",
    "Great question! Let me think about this carefully before I give you the answer. ",
    "Thank you for reaching out. Here is a detailed response to your request. ",
)
_AFTER = (
    "\nI hope this helps! Please let me know if you have any other questions.",
    "\nFeel free to ask me for anything else, and have a great day!",
    "\nNote: this response was generated automatically and may contain errors.",
)


@dataclass(frozen=True)
class Answer:
    """An answer and which of its characters are noise."""

    text: str
    noise: tuple[Span, ...] = ()
    kind: str = "clean"


Fault = Callable[[str, Sequence[str], random.Random], Answer]
"""Answer, answers of other questions, source of chance → the answer with the fault."""


def wrong_digits(answer: str, others: Sequence[str], chance: random.Random) -> Answer:
    """Half of the digits inside calculations become others."""
    places = [
        calculation.start() + digit.start()
        for calculation in _CALCULATION.finditer(answer)
        for digit in _DIGIT.finditer(calculation[0])
    ]
    wrong = sorted(chance.sample(places, -(-len(places) // 2)))
    letters = list(answer)
    for place in wrong:
        letters[place] = chance.choice([digit for digit in "0123456789" if digit != answer[place]])
    return Answer("".join(letters), tuple((place, place + 1) for place in wrong), "digits")


def random_words(answer: str, others: Sequence[str], chance: random.Random) -> Answer:
    """Three words in ten become words of other answers."""
    words = list(_WORD.finditer(answer))
    replaced = {word.start() for word in chance.sample(words, -(-3 * len(words) // 10))}
    parts: list[str] = []
    noise: list[Span] = []
    done = length = 0
    for word in words:
        if word.start() not in replaced:
            continue
        foreign = [one for one in _WORD.findall(chance.choice(others)) if one != word[0]] or ["banana"]
        before, new = answer[done : word.start()], chance.choice(foreign)
        parts += [before, new]
        noise.append((length + len(before), length + len(before) + len(new)))
        length, done = noise[-1][1], word.end()
    return Answer("".join([*parts, answer[done:]]), tuple(noise), "words")


def boilerplate(answer: str, others: Sequence[str], chance: random.Random) -> Answer:
    """A phrase before the answer and one after it."""
    before, after = chance.choice(_BEFORE), chance.choice(_AFTER)
    text = before + answer + after
    return Answer(text, ((0, len(before)), (len(text) - len(after), len(text))), "boilerplate")


def another_answer(answer: str, others: Sequence[str], chance: random.Random) -> Answer:
    """The whole answer of another question."""
    text = chance.choice(others)
    return Answer(text, ((0, len(text)),), "another")


FAULTS: tuple[Fault, ...] = (wrong_digits, random_words, boilerplate, another_answer)


def with_faults(answers: Sequence[str], share: float, seed: int) -> list[Answer]:
    """The answers; round(share · number) of them, drawn by `seed`, have one fault each, of all kinds alike."""
    chance = random.Random(f"faults {seed}")
    chosen = chance.sample(range(len(answers)), round(share * len(answers)))
    kinds = {place: FAULTS[number % len(FAULTS)] for number, place in enumerate(chosen)}
    found = []
    for place, answer in enumerate(answers):
        others = [*answers[:place], *answers[place + 1 :]]
        fault = kinds.get(place)
        if fault is wrong_digits and not _CALCULATION.search(answer):
            fault = random_words
        found.append(Answer(answer) if fault is None else fault(answer, others, chance))
    return found
