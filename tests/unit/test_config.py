"""Settings: their names, and what follows from them alone."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.config import CheckpointSettings, ParallelSettings, Settings

# Other tools rely on these names.
FIXED_NAMES = {
    "model": "hf_path checkpoint",
    "parallel": "tensor pipeline virtual_pipeline context sequence",
    "data": "train validation sequence_length",
    "selection": "method rho gamma layer scope rel_floor warmup_samples",
    "weights": "method divisor",
    "history": "source hf_path",
    "lora": "rank alpha dropout targets",
    "optimizer": "learning_rate",
    "training": "micro_batch_size global_batch_size steps epochs seed precision",
    "checkpoint": "directory save_every keep resume",
    "logging": "directory every records_every",
    "hardware": "gpus gpu",
}
# What was added since; a name that goes from here breaks somebody's YAML.
MORE_NAMES = {
    "model": "vocabulary_multiple",
    "data": "too_long packing shuffle",
    "selection": "rho_min rho_max loss_average rule threshold external",
    "history": "store reference_hf_path first_visit every decay",
    "optimizer": "min_learning_rate schedule warmup_fraction weight_decay beta1 beta2 epsilon clip_grad gradient_dtype "
    "first_moment_dtype second_moment_dtype offload_fraction",
    "training": "recompute validate_every offload_layers",
    "parallel": "expert first_stage_layers last_stage_layers",
    "lora": "rank_stabilized train_whole",
}


def test_names_are_frozen():
    found = {
        section.name: {entry.name for entry in dataclasses.fields(section.default_factory)}
        for section in dataclasses.fields(Settings)
    }
    wanted = {
        section: set(names.split()) | set(MORE_NAMES.get(section, "").split()) for section, names in FIXED_NAMES.items()
    }
    assert found.keys() == wanted.keys()
    assert {section: wanted[section] - names for section, names in found.items()} == dict.fromkeys(wanted, set())


def test_logging_directory_follows_the_checkpoints():
    assert Settings().logging_directory is None
    settings = Settings(checkpoint=CheckpointSettings(directory="runs/1"))
    assert settings.logging_directory == "runs/1/logs"
    settings.logging.directory = "here"
    assert settings.logging_directory == "here"


@pytest.mark.parametrize(
    ("layers", "stages", "ends"),
    [(28, 8, (2, 2)), (94, 4, (23, 23)), (126, 16, (7, 7)), (80, 8, (7, 7)), (9, 8, (2, 1)), (3, 4, None)],
)
def test_layers_of_the_ends(layers, stages, ends):
    """Qwen2.5-1.5B, Qwen3-235B, Llama 3.1 405B and 70B, and models with few layers."""
    assert ParallelSettings(pipeline=stages).uneven_ends(layers) == ends


@given(st.integers(1, 128), st.integers(2, 16), st.integers(1, 4))
def test_uneven_stages_hold_all_layers(layers, stages, chunks):
    parallel = ParallelSettings(pipeline=stages, virtual_pipeline=chunks)
    ends = parallel.uneven_ends(layers)
    if ends is None:
        assert layers % chunks or layers // chunks <= stages
        return
    parallel.first_stage_layers, parallel.last_stage_layers = ends
    found = parallel.stage_layers(layers)
    assert sum(found) == layers and len(set(found[1:-1])) <= 1 and min(found) > 0
    assert found != [layers // stages] * stages, "even stages need no numbers"
