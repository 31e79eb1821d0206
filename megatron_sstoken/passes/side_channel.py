"""Brings the attention masses of all captured layers to the last pipeline stage.

A layer may lie on an earlier stage than the losses. Its mass, one fp32 a token, then travels beside the activations: on
process groups of its own (one for each virtual chunk, so that the messages of a chunk arrive in the order of its
micro-batches), sent without waiting, received when the last stage finishes that micro-batch. By then the stage that
sends has computed it, since the activations came after it; so nobody waits for anybody who waits.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_sstoken.model.build import Model


@dataclass
class SideChannel:
    """The side channel of one pass through the schedule; made anew for each."""

    model: Model
    _sent: list[tuple[dist.Work | None, torch.Tensor]] = field(default_factory=list)
    _kept: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def send(self, chunk: int, masses: dict[int, torch.Tensor]) -> None:
        """Send what the attention captures of this rank's model chunk `chunk` saw in one micro-batch.

        Masses are sums over this rank's heads; those of several layers are added up.
        """
        if not masses:
            return
        total = torch.stack(list(masses.values())).sum(dim=0)
        layout = self.model.layout
        if layout.is_last_stage:
            self._kept.setdefault(chunk, []).append(total)
        else:
            work = dist.isend(total, dst=layout.last_stage_rank, group=layout.side_channel[chunk])
            self._sent.append((work, total))  # the tensor must live until it is sent

    def receive(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """On the last stage, for the next micro-batch in order: the mean over all query heads and captured layers.

        fp32 [tokens of this context parallel rank]; the same on all ranks of the tensor parallel group.
        """
        layout, architecture = self.model.layout, self.model.architecture
        total = torch.zeros(num_tokens, device=device)
        for stage, chunk in self.model.capturing_chunks:
            if stage == layout.pipeline_rank:
                total += self._kept[chunk].pop(0)
            else:
                part = torch.empty(num_tokens, device=device)
                source = dist.get_global_rank(layout.groups.pp, stage)
                dist.recv(part, src=source, group=layout.side_channel[chunk])
                total += part
        dist.all_reduce(total, group=layout.groups.tp)
        return total / (architecture.num_attention_heads * len(self.model.captured_layers))

    def finish(self) -> None:
        """Wait until everything sent has been taken."""
        for work, _ in self._sent:
            assert work is not None, "the receiver is a member of the group"
            work.wait()
        self._sent.clear()
