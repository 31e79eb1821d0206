"""Settings: their names, and what follows from them alone."""

import dataclasses

from megatron_sstoken.config import CheckpointSettings, Settings

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
