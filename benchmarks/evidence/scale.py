"""How much of everything there is: little on a CPU, so that all arms come to an end; as much as minutes allow on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of the data and of a step, for one device."""

    train: int
    """Problems to train on."""
    validation: int
    """Clean problems to measure losses on."""
    probe: int
    """Problems whose tokens are scored."""
    prose: int
    """Passages of another kind of text."""
    asked: int
    """Of the validation problems, those that the key arms answer at the end; 0: none, which a CPU would be too slow for."""
    longest: int
    """Characters of question and answer together."""
    sequence_length: int
    """Tokens of a pack: several problems, so that little of it is padding."""
    packs: int
    """Of an optimizer step."""
    precision: str
    """`training.precision`: bf16 keeps fp32 master weights, and is several times as fast where the processor has it."""
    seeds: int


SCALES = {
    "cpu": Scale(100, 80, 80, 30, 0, longest=400, sequence_length=512, packs=1, precision="bf16", seeds=3),
    "cuda": Scale(2000, 400, 400, 30, 300, longest=500, sequence_length=1024, packs=4, precision="bf16", seeds=5),
}
