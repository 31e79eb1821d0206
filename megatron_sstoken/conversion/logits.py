"""Hidden states and logits of megatron's model beside transformers': the limit follows from the arithmetic's own noise."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sstoken.conversion.reference import HEAD, Reference, States, recorded
from megatron_sstoken.device import compute_device
from megatron_sstoken.model.attention import sample_bounds
from megatron_sstoken.model.build import Model

LARGEST_FACTOR = 2.0
"""By how much more than the root mean square the largest difference may exceed its noise: a maximum varies more."""


@dataclass(frozen=True)
class Difference:
    """How far what one module computes is from float64; of transformers' own fp32 too, which is the noise."""

    name: str
    largest: float
    largest_noise: float
    rms: float
    rms_noise: float
    scale: float
    """Root mean square of the numbers themselves."""

    @classmethod
    def of(cls, name: str, ours: torch.Tensor, single: torch.Tensor, double: torch.Tensor) -> "Difference":
        """`ours` and `single` in fp32, `double` in float64; all of one shape."""
        difference, noise = (ours.double() - double).abs(), (single.double() - double).abs()
        scale = _rms(double)
        # Where transformers' fp32 is exact, half of a number's last digit is allowed.
        digit = torch.finfo(torch.float32).eps / 2
        return cls(
            name,
            float(difference.max()),
            max(float(noise.max()), digit * float(double.abs().max())),
            _rms(difference),
            max(_rms(noise), digit * scale),
            scale,
        )

    @property
    def ratio(self) -> float:
        """Differences as a multiple of the noise; NaN where a number is."""
        return self.rms / self.rms_noise

    def exceeds(self, factor: float) -> bool:
        """Whether it is more than `factor` times the noise."""
        within = self.ratio <= factor and self.largest <= LARGEST_FACTOR * factor * self.largest_noise
        return not within  # so that a NaN exceeds


@dataclass(frozen=True)
class Comparison:
    """What megatron's model makes of one text, beside transformers'."""

    text: str
    positions: int
    differences: list[Difference]
    """In the order of computation, the logits last."""
    divergence: float
    """Kullback-Leibler divergence of the next token's probabilities from float64's, in nats, mean over positions."""
    agreement: int
    """Positions at which the most probable token is the same."""

    def first_difference(self, factor: float) -> str | None:
        """Where differences begin to exceed `factor` times the noise; None if nowhere."""
        return next((one.name for one in self.differences if one.exceeds(factor)), None)

    def describe(self, factor: float) -> str:
        """The findings, for people."""
        logits, worst = self.differences[-1], max(self.differences, key=lambda one: one.ratio)
        first = self.first_difference(factor)
        lines = [
            f"{self.text:<12} {self.positions} positions: logits differ from float64 by {logits.largest:.2e} at most "
            f"(transformers in fp32: {logits.largest_noise:.2e})",
            f"             differences at most {worst.ratio:.2f} times that noise, in {worst.name} (limit {factor:g}); "
            f"KL {self.divergence:.1e}; same first choice at {self.agreement}",
        ]
        if first is not None:
            lines.append(f"             the first to differ: {first}")
        return "\n".join(lines)

    def table(self) -> str:
        """A line for every module: relative difference, relative noise, and their ratio."""
        lines = [f"{self.text}: relative differences from float64, and those of transformers in fp32"]
        lines += [
            f"  {one.name:<20} {one.rms / (one.scale or 1.0):.2e}  {one.rms_noise / (one.scale or 1.0):.2e}  {one.ratio:6.2f}"
            for one in self.differences
        ]
        return "\n".join(lines)


@torch.no_grad()
def compare(model: Model, reference: Reference | None, text: str, tokens: list[int]) -> Comparison | None:
    """Compare what `model` and `reference` (rank 0's) make of `tokens`. All ranks call it; rank 0 gets the comparison."""
    ours = gather_states(model, tokens)
    if ours is None or reference is None:
        return None
    single, double = reference.states(tokens)
    differences = [Difference.of(name, ours[name], single[name], double[name]) for name in double]
    wanted, found = double[HEAD].log_softmax(dim=-1), ours[HEAD].double().log_softmax(dim=-1)
    divergence = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1).mean()
    agreement = int((ours[HEAD].argmax(dim=-1) == double[HEAD].argmax(dim=-1)).sum())
    return Comparison(text, len(tokens), differences, float(divergence), agreement)


@torch.no_grad()
def gather_states(model: Model, tokens: list[int]) -> States | None:
    """fp32 states of all layers, and logits [tokens, words], on the first rank; None on the others. All ranks call it."""
    layout = model.layout
    stages: list[Any] | None = [None] * layout.world_size if layout.rank == 0 else None
    dist.gather_object(_states(model, tokens), stages, dst=0, group=layout.control)
    if stages is None:
        return None
    found = {name: value for stage in stages for name, value in stage.items()}
    shards = [found.pop((HEAD, rank)) for rank in range(layout.tensor_size)]
    return found | {HEAD: torch.cat(shards, dim=-1)[:, : model.architecture.vocabulary_size]}


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _states(model: Model, tokens: list[int]) -> dict[Any, torch.Tensor]:
    """Name → fp32 [tokens, hidden] of what this rank's stage computes; logits [tokens, words] under (HEAD, tensor rank)."""
    (chunk,) = model.unwrapped
    layout, device = model.layout, compute_device()
    hidden = None
    if not layout.is_first_stage:
        shape = (len(tokens), 1, model.config.hidden_size)
        hidden = torch.empty(shape, dtype=model.config.params_dtype, device=device)
        dist.recv(hidden, src=dist.get_global_rank(layout.groups.pp, layout.pipeline_rank - 1), group=layout.groups.pp)
    chunk.set_input_tensor([hidden])
    modules = {f"layer {layer.layer_number - 1}": layer for layer in chunk.decoder.layers}
    if layout.is_first_stage:
        modules["the embedding"] = chunk.embedding
    if layout.is_last_stage:
        modules["the final norm"] = chunk.decoder.final_layernorm
    output, found = recorded(modules, lambda: _forward(chunk, tokens, device))
    states: dict[Any, torch.Tensor] = {name: value.float() for name, value in found.items()}
    if layout.is_last_stage:
        states[(HEAD, layout.tensor_rank)] = output[0].float().cpu()
    else:
        following = dist.get_global_rank(layout.groups.pp, layout.pipeline_rank + 1)
        dist.send(output.contiguous(), dst=following, group=layout.groups.pp)
    return states


def _forward(chunk: Any, tokens: list[int], device: torch.device) -> torch.Tensor:
    ids = torch.tensor([tokens], device=device)
    position = torch.arange(len(tokens), device=device).unsqueeze(0)
    return chunk(ids, position, None, packed_seq_params=sample_bounds([len(tokens)]))
