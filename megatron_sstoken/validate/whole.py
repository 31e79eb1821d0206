"""Are the files of a run as they were written? Compared with their checksums, beside the run or before it."""

import os
from pathlib import Path

from megatron_sstoken.checkpoint.manifest import Checkpoint
from megatron_sstoken.checkpoint.weights_source import starting_weights
from megatron_sstoken.config import SettingsError
from megatron_sstoken.integrity import Checked, FileCheck, files_to_check
from megatron_sstoken.parallel import Layout, agree_on_problems
from megatron_sstoken.run_plan import RunPlan

_PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py --overwrite"
_SCORE_AGAIN = "delete the folder, and the next run scores it again"
_ANOTHER_COPY = "take another copy"
_ONE_BEFORE = "set checkpoint.on_damaged=previous (or remove the folder) to resume from the one before"


def checkpoint_files(owner: str, folder: Path, layout: Layout, *, remedy: str) -> Checked:
    """This rank's share of the files of a checkpoint, which all nodes see. Raises SettingsError as `files_to_check`."""
    try:
        return files_to_check(owner, folder, remedy, share=(layout.rank, layout.world_size))
    except ValueError as error:
        raise SettingsError([str(error)]) from error


class RunFiles:
    """The comparison of all files that a run reads, dealt out over its processes. All ranks make it and call its methods."""

    def __init__(self, plan: RunPlan, layout: Layout, *, resumed: Checkpoint | None = None, history: list[Path]):
        """`resumed`: the checkpoint that the run goes on from; `history`: folders of its history losses."""
        self._checked = plan.settings.training.verify == "off"
        parts, known = ([], []) if self._checked else _parts(plan, layout, resumed, history)
        self._check = FileCheck(parts, known=known)
        if plan.settings.training.verify == "before":
            self.require_whole()

    @property
    def is_damaged(self) -> bool:
        """Whether this rank has found a damaged file by now."""
        return bool(self._check.problems)

    def require_whole(self) -> None:
        """Wait until all files have been compared. Raises SettingsError, on all ranks, where one is damaged."""
        if not self._checked:
            agree_on_problems(self._check.wait())
            self._checked = True


def _parts(
    plan: RunPlan, layout: Layout, resumed: Checkpoint | None, history: list[Path]
) -> tuple[list[Checked], list[str]]:
    """What this rank compares, and what is already known to be damaged.

    What may lie on each node for itself is compared on each; checkpoints, which are shared, once.
    """
    settings = plan.settings
    of_node = (int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    of_all = (layout.rank, layout.world_size)
    parts: list[Checked] = []
    known: list[str] = []

    def add(owner: str, folder: str | Path, remedy: str, share: tuple[int, int], suffix: str = "") -> None:
        try:
            parts.append(
                files_to_check(owner, Path(folder), remedy, share=share, wanted=lambda name: name.endswith(suffix))
            )
        except ValueError as error:
            known.append(str(error))

    add("data.train", settings.data.train or "", _PREPARE_AGAIN, of_node)
    if settings.data.validation:
        add("data.validation", settings.data.validation, _PREPARE_AGAIN, of_node)
    for folder in history:
        add("history.store", folder, _SCORE_AGAIN, of_node)
    start = starting_weights(settings)
    if start.stored is not None:
        add("model.checkpoint", start.stored.folder, _ANOTHER_COPY, of_all)
    if start.base.checkpoint is None:  # people edit the other files of a model's folder
        add("model.hf_path", settings.model.hf_path or "", _ANOTHER_COPY, of_node, suffix=".safetensors")
    if resumed is not None:
        add("checkpoint.directory", resumed.folder, _ONE_BEFORE, of_all)
    return parts, known
