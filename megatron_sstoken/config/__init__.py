"""Every setting of a run: typed, documented once, with the rules of its section beside it.

`megatron_sstoken.command_line` reads them from YAML and the command line; `megatron_sstoken.validate` checks what takes more
than one section, the model, the data or the number of processes.
"""

import os
from dataclasses import dataclass, field

from megatron_sstoken.config.model import (
    DataSettings,
    HardwareSettings,
    LoraSettings,
    LoraTarget,
    ModelSettings,
    ParallelSettings,
    WholeModule,
    adapter_scale,
)
from megatron_sstoken.config.rules import RENAMED, SettingsError
from megatron_sstoken.config.run import CheckpointSettings, LoggingSettings, OptimizerSettings, TrainingSettings
from megatron_sstoken.config.selection import HistorySettings, SelectionSettings, WeightSettings

__all__ = [
    "RENAMED",
    "CheckpointSettings", "DataSettings", "HardwareSettings", "HistorySettings", "LoggingSettings", "LoraSettings",
    "LoraTarget", "ModelSettings", "OptimizerSettings", "ParallelSettings", "SelectionSettings", "Settings",
    "SettingsError", "TrainingSettings", "WeightSettings", "WholeModule", "adapter_scale",
]  # fmt: skip


@dataclass
class Settings:
    """Fine-tunes a Hugging Face model on selected tokens, on megatron-core."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)

    @property
    def logging_directory(self) -> str | None:
        """Where TensorBoard events and records go, or None."""
        if self.logging.directory is None and self.checkpoint.directory is not None:
            return os.path.join(self.checkpoint.directory, "logs")
        return self.logging.directory

    def problems(self) -> list[str]:
        """What breaks a rule of a section, whatever the other sections say."""
        return [
            problem for section in vars(self).values() if hasattr(section, "problems") for problem in section.problems()
        ]
