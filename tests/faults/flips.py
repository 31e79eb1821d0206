"""How many flipped bits are found: `python -m tests.faults.flips --flips 500` changes one bit at a time in every artefact.

A bit is drawn among all bits of an artefact's files; the artefact is compared with its checksums, and the bit is put back.
Exit code 1 where one is not found.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from megatron_sstoken import train
from megatron_sstoken.conversion.check import check_folders
from megatron_sstoken.conversion.hf import from_hf, to_hf
from megatron_sstoken.integrity import damage
from megatron_sstoken.parallel import reset_layout
from tests.helpers.flip import flip_bit
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store


def make_artefacts(folder: Path) -> dict[str, Path]:
    """One of each kind, of a tiny model: name → folder with checksums."""
    model = make_model(folder / "model")
    make_store(folder / "data", make_samples(24, seed=1))
    settings = make_settings(
        model,
        str(folder / "data"),
        training__steps=3,  # an epoch: of a history store only what was scored is compared
        checkpoint__directory=str(folder / "run"),
        history__store=str(folder / "history"),
    )
    train.run(settings)
    reset_layout()
    from_hf(model, str(folder / "imported"))
    to_hf(str(folder / "run"), str(folder / "exported"))
    return {
        "prepared data": folder / "data",
        "history store": folder / "history",
        "checkpoint of a run": folder / "run" / "step_0000003",
        "checkpoint of a conversion": folder / "imported" / "step_0000000",
        "Hugging Face folder of a conversion": folder / "exported",
    }


def files_of(folder: Path) -> list[Path]:
    """What a flip may hit: what lies in the folder itself, a conversion's list of its files apart."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != "conversion.json")


def is_found(folder: Path, place: int, files: list[Path]) -> bool:
    """Whether the bit `place` of all bits of `files`, flipped, is found."""
    for path in files:
        size = 8 * path.stat().st_size
        if place < size:
            break
        place -= size
    flip_bit(path, place)
    try:
        return bool(damage(folder))
    finally:
        flip_bit(path, place)


def measure_speed(folder: Path) -> str:
    """Bytes a second over a large file, twice: from the disk's cache, as after writing."""
    from megatron_sstoken.integrity import checksum_of, write_checksums

    large = folder / "large"
    large.mkdir()
    with open(large / "file", "wb") as file:
        for _ in range(64):
            file.write(random.Random(1).randbytes(1 << 24))
    begun = time.monotonic()
    write_checksums(large, {"file": checksum_of(large / "file")})
    once = time.monotonic() - begun
    check = check_folders([large], workers=1)
    return f"{2**30 / once / 1e9:.2f} GB/s to make it, {check.size / check.seconds / 1e9:.2f} GB/s to check it"


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500, help="of each artefact (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, missed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        artefacts = make_artefacts(Path(folder))
        speed = measure_speed(Path(folder))
        rows = []
        for name, artefact in artefacts.items():
            assert damage(artefact) == [], "whole before"
            files = files_of(artefact)
            bits = 8 * sum(path.stat().st_size for path in files)
            places = [draw.randrange(bits) for _ in range(options.flips)]
            found = sum(is_found(artefact, place, files) for place in tqdm(places, name))
            missed += options.flips - found
            rows.append(f"| {name} | {len(files)} | {bits // 8:,} | {options.flips} | {found} |")
    print("| artefact | files | bytes | flipped bits | found |\n|---|---:|---:|---:|---:|")
    print("\n".join(rows))
    print(f"one checksum: {speed}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
