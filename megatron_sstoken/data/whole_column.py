"""Token columns that are made at once, and appear whole or not at all; `column.py` has those that are filled bit by bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sstoken.data.column import COLUMN_FORMAT, MANIFEST
from megatron_sstoken.files import json_text, naming, whole_folder, write_json
from megatron_sstoken.integrity import checksum_of, checksum_of_text, write_checksums

WHOLE_VERSION = 1
"""Of the format: columns that are complete."""
_BLOCK = 1 << 20


def write_column(
    path: str | Path, identity: dict[str, Any], num_values: int, fill: Callable[[np.ndarray], None]
) -> None:
    """Make the column of `identity` (any JSON object) at `path`; `TokenColumn` reads it.

    `fill` is given its values, float32 [num_values], all NaN and memory-mapped, and sets some in any order; where it raises,
    nothing is left. One process at a time may make a column.
    """
    header = {"format": COLUMN_FORMAT, "format_version": WHOLE_VERSION, "num_values": num_values, "identity": identity}
    header = json.loads(json.dumps(header))
    with whole_folder(Path(path), overwrite=False) as folder:
        folder.mkdir(parents=True)
        file = folder / "values.bin"
        with naming(file):
            with open(file, "wb") as stream:
                for start in range(0, num_values, _BLOCK):
                    stream.write(np.full(min(_BLOCK, num_values - start), np.nan, dtype=np.float32).tobytes())
            values = np.memmap(file, np.float32, "r+")
            fill(values)
            values.flush()
            del values
            write_json(folder / MANIFEST, header)
            described = checksum_of_text(json_text(header))
            write_checksums(folder, {file.name: checksum_of(file), MANIFEST: described})
