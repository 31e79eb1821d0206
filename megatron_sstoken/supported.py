"""Which versions and GPUs are supported. Plain Python: set-up and the doctor read it on broken machines, too."""

from typing import NamedTuple


class Line(NamedTuple):
    """One line of megatron-core: the version that is tested, for which Python, and beside which Transformer Engine."""

    megatron_core: str
    python: str
    """The environment marker under which it is installed."""
    oldest_transformer_engine: str
    newer_transformer_engine: str
    """The first version that is too new."""

    @property
    def megatron_core_requirement(self) -> str:
        """As setup.py and constraints.txt name it."""
        return f"megatron-core=={self.megatron_core}; {self.python}"

    @property
    def transformer_engine_range(self) -> str:
        """Versions of Transformer Engine that this line takes."""
        return f">={self.oldest_transformer_engine},<{self.newer_transformer_engine}"

    def takes_transformer_engine(self, version: str) -> bool:
        """Whether `version` is in that range, its release and build suffixes left aside."""
        oldest, newer = self.oldest_transformer_engine, self.newer_transformer_engine
        return _version(oldest) <= _version(version) < _version(newer)

    @property
    def transformer_engine(self) -> str:
        """What to install beside it; with --no-build-isolation, for its part for torch is built against the one installed."""
        return f"transformer-engine[pytorch]{self.transformer_engine_range}"


OLDEST_TORCH = "2.8"
"""The first whose `torch.mm` takes `out_dtype`, by which the head on GPUs accumulates bf16 products in fp32."""
LINES = (
    # Its extra `dev` asks for 2.9 to 2.11; 2.9 cannot attend to windows of packed samples under context parallel.
    Line("0.16.1", 'python_version < "3.12"', "2.10", "2.12"),
    # The newest for Python 3.12 and later. It states no range; what it imports without a fallback is there from 2.9 to 2.20.
    Line("0.19.2", 'python_version >= "3.12"', "2.10", "2.21"),
)
"""Both run on Python 3.12 as well; which one is installed there is `python`'s choice."""


def line_of(megatron_core: str | None, python: tuple[int, int]) -> Line:
    """The line that an installed version belongs to; of an unknown version, or None, the one for this Python."""
    installed = [line for line in LINES if line.megatron_core == megatron_core]
    return installed[0] if installed else LINES[python >= (3, 12)]


TOKEN_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""FP8 recipe → what the number of tokens that a rank holds must be a multiple of: the tiles that share a scale."""


def fp8_problem(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Why a GPU of this compute capability cannot compute a recipe with this CUDA version, or None if it can.

    Transformer Engine's own rules, which it asserts in the middle of a run.
    """
    has = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"{has}, FP8 needs 8.9 (Ada, Hopper): use another GPU"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return f"{has}, mxfp8 needs 10.x (Blackwell): use tensorwise"
    if recipe == "blockwise" and (capability < (9, 0) or _version(cuda) < (12, 9)):
        return f"{has} and CUDA {cuda or '-'}, blockwise needs 9.0 (Hopper) and CUDA 12.9: use tensorwise"
    return None


def is_older(version: str, than: str) -> bool:
    """Whether `version` comes before `than`, by their first two numbers."""
    return _version(version) < _version(than)


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0.0").split(".")[:2])
