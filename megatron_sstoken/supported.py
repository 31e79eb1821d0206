"""Which versions and GPUs are supported. Plain Python that imports nothing: the doctor reads it on broken machines too."""

MEGATRON_CORE = "0.16.1"
"""The one version that is tested; `device.py` adapts its private parts."""
TRANSFORMER_ENGINE_OLDEST, TRANSFORMER_ENGINE_TOO_NEW = "2.9", "2.12"
"""megatron-core takes the first of these and later ones, up to but without the second."""
TRANSFORMER_ENGINE_RANGE = f">={TRANSFORMER_ENGINE_OLDEST},<{TRANSFORMER_ENGINE_TOO_NEW}"
TRANSFORMER_ENGINE_REQUIREMENT = f"transformer-engine[pytorch]{TRANSFORMER_ENGINE_RANGE}"
"""As setup.py's extra `te` names it."""

TOKEN_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""FP8 recipe → what the number of tokens that a rank holds must be a multiple of: the tiles that share a scale."""


def fp8_problem(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Why a GPU of this compute capability cannot compute a recipe with this CUDA version, or None if it can.

    Transformer Engine's own rules, which it asserts in the middle of a run.
    """
    has = f"compute capability {capability[0]}.{capability[1]}"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return f"{has}, mxfp8 needs 10.x (Blackwell): use tensorwise"
    if recipe == "blockwise" and (capability < (9, 0) or _version(cuda) < (12, 9)):
        return f"{has} and CUDA {cuda or '-'}, blockwise needs 9.0 (Hopper) and CUDA 12.9: use tensorwise"
    if capability < (8, 9):
        return f"{has}, FP8 needs 8.9 (Ada, Hopper)"
    return None


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0.0").split(".")[:2])
