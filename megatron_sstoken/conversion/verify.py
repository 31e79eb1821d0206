"""Proof that a conversion is right: every tensor the same, and the same logits as transformers at every position.

A round trip alone proves little: a matrix transposed on the way in and back on the way out survives it (seen in
NVIDIA-NeMo/Megatron-Bridge, 3743). So the model is also run, on the layout asked for, beside transformers in fp32; where the
logits differ, the hidden states of every layer tell where it begins.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_sstoken.checkpoint.manifest import open_checkpoint
from megatron_sstoken.checkpoint.save_load import load_checkpoint
from megatron_sstoken.config import ParallelSettings, Settings
from megatron_sstoken.device import compute_device
from megatron_sstoken.model.attention import sample_bounds
from megatron_sstoken.model.build import Model, build_model, load_weights
from megatron_sstoken.model.families import Split, read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import (
    held_weights,
    join_shards,
    rules_of_chunk,
    superfluous_tensors,
    to_hugging_face,
)
from megatron_sstoken.parallel import broadcast_object, create_layout, start_processes

REAL_TEXT = """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips
did Natalia sell altogether in April and May? She sold 48 / 2 = 24 clips in May, and 48 + 24 = 72 altogether. #### 72
def mean(values): return sum(values) / len(values)  # raises ZeroDivisionError for []
Grüße aus Zürich – ça va? Да, хорошо. 今日は良い天気ですね。 "Quotes", (brackets) & 3.14159 < 22/7.
"""
"""What real text is by default: sentences, arithmetic, code, several scripts."""


@dataclass
class Comparison:
    """Logits of one text, megatron's against transformers'; absolute differences."""

    text: str
    positions: int
    largest: float
    mean: float
    first_difference: str | None
    """Where hidden states begin to differ by more than the tolerance; None where nothing does."""


@dataclass
class Verification:
    """What `verify` found; the same on all ranks."""

    num_tensors: int
    """Tensors of the Hugging Face folder."""
    differing: list[str] = field(default_factory=list)
    """Tensors whose bits differ, and those that the round trip lost or invented, each with the reason."""
    comparisons: list[Comparison] = field(default_factory=list)
    tolerance: float = 1e-4

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and all(c.first_difference is None for c in self.comparisons)

    def describe(self) -> str:
        """The findings, for people."""
        lines = [f"tensors      {self.num_tensors - len(self.differing)} of {self.num_tensors} bit-identical"]
        lines += [f"             differs: {reason}" for reason in self.differing[:10]]
        if len(self.differing) > 10:
            lines.append(f"             and {len(self.differing) - 10} more")
        for c in self.comparisons:
            verdict = "" if c.first_difference is None else f"; the first to differ: {c.first_difference}"
            lines.append(
                f"{c.text:<12} {c.positions} positions: logits differ by {c.largest:.2e} at most, {c.mean:.2e} on average "
                f"(limit {self.tolerance:g}){verdict}"
            )
        return "\n".join(lines)


def verify(
    hf_path: str,
    *,
    checkpoint: str | None = None,
    parallel: ParallelSettings | None = None,
    tolerance: float = 1e-4,
    positions: int | None = None,
    text: str = REAL_TEXT,
) -> Verification:
    """Compare a Hugging Face folder with megatron's model of it, on the layout `parallel`. All ranks call it.

    The model is read from `checkpoint` (a folder of megatron's, or a directory of them), by default from `hf_path` itself.
    (a) Its parameters, put together from all ranks and converted back, must be those of `hf_path` bit for bit. (b) Its
    fp32 logits must agree with transformers' within `tolerance`, at every position of random tokens and of `text` (where
    the folder has a tokenizer). `positions`: tokens of each; default 256, or more than the sliding window. Rank 0 holds
    the whole model of transformers in fp32. Raises ValueError for input that cannot be read.
    """
    architecture, tensors = read_architecture(hf_path), HuggingFaceWeights(hf_path)
    tensors.check_files()
    stored = None if checkpoint is None else open_checkpoint(checkpoint)
    if stored is not None and stored.state.adapters is not None:
        raise ValueError(
            f"{stored.folder} holds adapters alone: export it with to-hf --merge, and verify what comes out"
        )
    settings = Settings(parallel=parallel or ParallelSettings())
    settings.training.precision = "fp32"
    start_processes()
    layout = create_layout(settings.parallel, seed=0)
    model = build_model(architecture, settings, layout, trainable=False)
    if stored is None:
        load_weights(model, hf_path)
    else:
        load_checkpoint(stored, model)
    model.train(False)
    result = Verification(len(tensors.names()), compare_tensors(model, tensors), tolerance=tolerance)
    if positions is None:
        positions = max(256, (architecture.sliding_window or 0) + 64)
    positions = min(positions, architecture.longest_sequence)
    reference = _reference(hf_path) if layout.rank == 0 else None
    for name, tokens in _texts(hf_path, architecture.vocabulary_size, positions, text).items():
        found = compare_logits(model, reference, tokens, tolerance)
        if found is not None:
            result.comparisons.append(Comparison(name, len(tokens), *found))
    return broadcast_object(result, source=0)


def compare_tensors(model: Model, tensors: HuggingFaceWeights) -> list[str]:
    """What differs between the folder and the model's parameters converted back; the same list on all ranks.

    Each stage's first tensor rank puts its parameters together and reads the folder for itself.
    """
    (chunk,) = model.unwrapped
    layout, architecture = model.layout, model.architecture
    found: dict[str, str | None] = {}
    rules = rules_of_chunk(chunk, architecture)
    with torch.no_grad():
        for name, parameter in held_weights(chunk):
            rule, layer = rules[name]
            whole = parameter.detach()
            if rule.expert is None and rule.split is not Split.WHOLE and layout.tensor_size > 1:
                shards = [torch.empty_like(whole) for _ in range(layout.tensor_size)]
                dist.all_gather(shards, whole.contiguous(), group=layout.groups.tp)
                whole = join_shards(rule, shards)
            if rule.expert is not None or layout.tensor_rank == 0:
                for tensor_name, value in to_hugging_face(rule, layer, whole.cpu(), architecture):
                    found[tensor_name] = _difference(tensors, tensor_name, value)
    everywhere: list = [None] * layout.world_size
    dist.all_gather_object(everywhere, found, group=layout.control)
    together: dict[str, str | None] = {}
    for part in everywhere:
        together |= {name: reason for name, reason in part.items() if reason or not together.get(name)}
    allowed = superfluous_tensors(tensors, architecture)
    reasons = {name: "is lost" for name in tensors.names() if name not in together and name not in allowed}
    reasons |= {name: reason for name, reason in together.items() if reason}
    return [f"{name} {reason}" for name, reason in sorted(reasons.items(), key=lambda item: _natural(item[0]))]


def _natural(name: str) -> list:
    """Sorts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _difference(tensors: HuggingFaceWeights, name: str, value: torch.Tensor) -> str | None:
    """How the tensor `name` of the folder differs from `value` in its dtype; None if not at all."""
    if name not in tensors:
        return "is not in the folder"
    expected = tensors.slice(name)[:]
    if expected.shape != value.shape:
        return f"has shape {list(value.shape)}, not {list(expected.shape)}"
    back = value.to(expected.dtype)
    if torch.equal(back.view(torch.uint8), expected.view(torch.uint8)):
        return None
    number = int((back != expected).sum())
    return f"in {number:,} of {back.numel():,} numbers, by up to {(back.float() - expected.float()).abs().max():.3g}"


def _texts(hf_path: str, vocabulary_size: int, positions: int, text: str) -> dict[str, list[int]]:
    """Title → token ids: random ones, and those of the text, repeated to the length, if there is a tokenizer."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(0)
    texts = {"random text": torch.randint(0, vocabulary_size, (positions,), generator=generator).tolist()}
    try:
        tokens = AutoTokenizer.from_pretrained(hf_path, trust_remote_code=False)(text)["input_ids"]
    except Exception:  # transformers raises anything where there is no tokenizer that it can read
        tokens = []
    if tokens and max(tokens) < vocabulary_size:
        texts["real text"] = (tokens * math.ceil(positions / len(tokens)))[:positions]
    return texts


def _reference(hf_path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        hf_path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()


@torch.no_grad()
def compare_logits(
    model: Model, reference: Any, tokens: list[int], tolerance: float
) -> tuple[float, float, str | None] | None:
    """Largest and mean difference of the logits of `tokens`, and where it begins. On rank 0 (others get None).

    A difference counts where it exceeds `tolerance`, in hidden states relative to their largest number if that is above 1.
    """
    stages: list = [None] * model.layout.world_size
    dist.all_gather_object(stages, _megatron_states(model, tokens), group=model.layout.control)
    if model.layout.rank != 0:
        return None
    ours = {name: value for stage in stages for name, value in stage.items()}
    theirs = _reference_states(reference, tokens)
    vocabulary = model.architecture.vocabulary_size
    ours["the vocabulary head"] = torch.cat(
        [ours.pop(("logits", rank)) for rank in range(model.layout.tensor_size)], dim=-1
    )[:, :vocabulary]
    difference = (ours["the vocabulary head"] - theirs["the vocabulary head"]).abs()
    first = next((name for name in theirs if _differs(ours[name], theirs[name], name, tolerance)), None)
    return float(difference.max()), float(difference.mean()), first


def _differs(ours: torch.Tensor, theirs: torch.Tensor, name: str, tolerance: float) -> bool:
    scale = 1.0 if name == "the vocabulary head" else max(1.0, float(theirs.abs().max()))
    return not float((ours - theirs).abs().max()) <= tolerance * scale  # not: a NaN differs


def _megatron_states(model: Model, tokens: list[int]) -> dict:
    """Name → fp32 [tokens, hidden] of what this rank's stage computes; logits [tokens, words] under ("logits", rank)."""
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
    output, states = _recorded(modules, lambda: _forward(chunk, tokens, device))
    if layout.is_last_stage:
        states[("logits", layout.tensor_rank)] = output[0].float().cpu()
    else:
        following = dist.get_global_rank(layout.groups.pp, layout.pipeline_rank + 1)
        dist.send(output.contiguous(), dst=following, group=layout.groups.pp)
    return states


def _forward(chunk: Any, tokens: list[int], device: torch.device) -> torch.Tensor:
    ids = torch.tensor([tokens], device=device)
    position = torch.arange(len(tokens), device=device).unsqueeze(0)
    return chunk(ids, position, None, packed_seq_params=sample_bounds([len(tokens)]))


def _reference_states(reference: Any, tokens: list[int]) -> dict[str, torch.Tensor]:
    """The same from transformers, in the order of computation."""
    inner = reference.model
    modules = {f"layer {number}": layer for number, layer in enumerate(inner.layers)}
    modules["the final norm"] = inner.norm
    embedded: list[torch.Tensor] = []
    # What the first layer is given: some families multiply what the embedding's module returns.
    handle = inner.layers[0].register_forward_pre_hook(lambda _layer, inputs: embedded.append(inputs[0]))
    output, states = _recorded(modules, lambda: reference(torch.tensor([tokens]), use_cache=False))
    handle.remove()
    states["the embedding"] = embedded[0].float().cpu().squeeze(0)
    return {name: states[name] for name in ("the embedding", *modules)} | {"the vocabulary head": output.logits[0]}


def _recorded(modules: dict[str, torch.nn.Module], run: Callable[[], Any]) -> tuple[Any, dict]:
    """`run()`, and the output of each module meanwhile as fp32 [tokens, hidden] on the CPU."""
    states: dict = {}

    def keep(name: str) -> Callable:
        def hook(_module, _inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            states[name] = value.float().cpu().reshape(-1, value.shape[-1])

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        return run(), states
    finally:
        for handle in handles:
            handle.remove()
