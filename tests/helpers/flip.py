"""One bit of a file that is not as it was."""

from pathlib import Path


def flip_bit(path: Path, place: int | None = None) -> None:
    """Change bit `place` of a file, counted over its end again from its beginning; default: one in its middle."""
    content = bytearray(path.read_bytes())
    place = 4 * len(content) if place is None else place
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
