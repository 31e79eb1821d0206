"""Whether a run has as much data as its settings speak of."""

from megatron_sstoken.config import Settings
from megatron_sstoken.run_plan import DataPlan
from megatron_sstoken.validate.findings import Findings

_MANY = 0.1
"""Share of the samples from which it is told that they are cut or left out."""


def check_amounts(settings: Settings, train: DataPlan, found: Findings) -> bool:
    """Tell of samples that are cut, and of batches that are larger than the data. Whether there is enough for a micro-batch."""
    data, training = settings.data, settings.training
    samples = train.samples
    number = len(train.store.lengths)
    for count, what in ((samples.num_truncated, "cuts"), (samples.num_dropped, "leaves out")):
        if count >= _MANY * number:
            found.notes.append(
                f"data.sequence_length={data.sequence_length} {what} {100 * count / number:.0f} % of the samples ({count:,} of "
                f"{number:,}; the longest has {int(train.store.lengths.max()):,} tokens): use a larger one, if memory allows"
            )
    packs = train.order.num_packs(1)
    length = f"of up to {data.sequence_length} tokens"
    if training.micro_batch_size > packs:
        found.problems.append(
            f"training.micro_batch_size={training.micro_batch_size} is more than the {packs:,} packs {length} that "
            f"data.train={data.train} makes, and a GPU computes as many at once: use 1 to 16, as its memory allows"
        )
    elif training.global_batch_size > packs:
        found.notes.append(
            f"training.global_batch_size={training.global_batch_size} is more than the {packs:,} packs {length} of an epoch: a "
            f"step would be {'all of the data' if training.epochs == 1 else 'several epochs'}; use a smaller one for more steps"
        )
    return training.micro_batch_size <= packs
