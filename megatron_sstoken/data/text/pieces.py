"""What the entries of a vocabulary stand for, as bytes: a token may be part of a character."""

import re

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(0x100)} - {*_PRINTABLE})
ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}
"""Character → byte of byte-level BPE, as in GPT-2: bytes that cannot be printed are counted from U+0100."""
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""An entry that stands for one byte, in vocabularies made by sentencepiece."""
SPACE = "\u2581"
"""How sentencepiece writes a space."""


def byte_level(piece: str) -> bytes:
    """Bytes of an entry of a byte-level vocabulary."""
    if not all(character in ALPHABET for character in piece):
        return piece.encode()
    return bytes(ALPHABET[character] for character in piece)


def sentencepiece(piece: str) -> bytes:
    """Bytes of an entry of a vocabulary as sentencepiece makes it."""
    if byte := BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE, " ").encode()
