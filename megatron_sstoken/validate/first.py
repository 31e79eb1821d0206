"""What can be told of settings before torch and megatron are imported: rules of each section, and paths that they name."""

import os

from megatron_sstoken.config import Settings
from megatron_sstoken.folders import data_folder_problem, model_folder_problem, writing_problem


def first_problems(settings: Settings) -> list[str]:
    """Broken rules of the sections, and paths that are not what they should be; empty where there are none.

    On several nodes paths wait until all processes can be told what one of them does not find.
    """
    number = os.environ.get("WORLD_SIZE", "1")
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE", number) == number
    return settings.problems() + (path_problems(settings) if is_one_node else [])


def path_problems(settings: Settings) -> list[str]:
    """Folders that are read and are not there, or of another kind; folders to write to that cannot be written."""
    data, history = settings.data, settings.history
    models = {
        "model.hf_path": settings.model.hf_path,
        "history.hf_path": history.hf_path,
        "history.reference_hf_path": history.reference_hf_path,
    }
    found = [(name, model_folder_problem(path)) for name, path in models.items() if path is not None]
    folders = {"data.train": data.train, "data.validation": data.validation}
    found += [(name, data_folder_problem(path)) for name, path in folders.items() if path is not None]
    return [f"{name}: {problem}" for name, problem in found if problem] + writing_problems(settings)


def writing_problems(settings: Settings) -> list[str]:
    """Folders to write to that cannot be written."""
    written = {
        "checkpoint.directory": settings.checkpoint.directory,
        "logging.directory": settings.logging.directory,
        "history.store": settings.history.store,
    }
    found = [writing_problem(name, path) for name, path in written.items() if path is not None]
    return [one for one in found if one is not None]
