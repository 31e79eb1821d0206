"""Proof that a conversion is right: every tensor the same, and what transformers computes at every position.

A round trip alone proves little: a matrix transposed on the way in and back on the way out survives it (seen in
NVIDIA-NeMo/Megatron-Bridge, 3743). So the model is also run, on the layout asked for, beside transformers; the hidden states
of every layer tell where differences begin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist

from megatron_sstoken.checkpoint.manifest import open_checkpoint
from megatron_sstoken.checkpoint.save_load import load_checkpoint
from megatron_sstoken.config import ParallelSettings, Settings
from megatron_sstoken.conversion.logits import Comparison, compare
from megatron_sstoken.conversion.reference import Reference, check_streaming
from megatron_sstoken.conversion.served import ServedComparison, Server, compare_with_server, predict
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
from megatron_sstoken.parallel import agree_on_problems, broadcast_object, create_layout, start_processes

FACTOR = 4.0
"""Differences allowed, as a multiple of the noise of transformers' own fp32: right models come to about 1."""
REAL_TEXT = """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips
did Natalia sell altogether in April and May? She sold 48 / 2 = 24 clips in May, and 48 + 24 = 72 altogether. #### 72
def mean(values): return sum(values) / len(values)  # raises ZeroDivisionError for []
Grüße aus Zürich – ça va? Да, хорошо. 今日は良い天気ですね。 "Quotes", (brackets) & 3.14159 < 22/7.
"""
"""What real text is by default: sentences, arithmetic, code, several scripts."""


@dataclass
class Verification:
    """What `verify` found; the same on all ranks."""

    num_tensors: int
    """Tensors of the Hugging Face folder."""
    differing: list[str] = field(default_factory=list)
    """Tensors whose bits differ, and those that the round trip lost or invented, each with the reason."""
    comparisons: Sequence[Comparison | ServedComparison] = ()
    factor: float = FACTOR

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and all(c.first_difference(self.factor) is None for c in self.comparisons)

    def describe(self) -> str:
        """The findings, for people."""
        lines = [f"tensors      {self.num_tensors - len(self.differing)} of {self.num_tensors} bit-identical"]
        lines += [f"             differs: {reason}" for reason in self.differing[:10]]
        if len(self.differing) > 10:
            lines.append(f"             and {len(self.differing) - 10} more")
        lines += [comparison.describe(self.factor) for comparison in self.comparisons]
        return "\n".join(lines)


def verify(
    hf_path: str,
    *,
    checkpoint: str | None = None,
    parallel: ParallelSettings | None = None,
    factor: float = FACTOR,
    positions: int | None = None,
    text: str = REAL_TEXT,
    stream: bool = False,
    served: str | None = None,
    served_model: str | None = None,
) -> Verification:
    """Compare a Hugging Face folder with megatron's model of it, on the layout `parallel`. All ranks call it.

    The model is read from `checkpoint` (a folder of megatron's, or a directory of them), by default from `hf_path` itself.
    (a) Its parameters, put together from all ranks and converted back, must be those of `hf_path` bit for bit. (b) What
    its embedding, layers, final norm and head compute in fp32 must be no further from transformers in float64 than `factor`
    times transformers' own fp32 is, over random tokens and `text` (where the folder has a tokenizer). `positions`: tokens of
    each; default 256, or more than the sliding window. Rank 0 holds transformers' model in fp32, with `stream` one
    layer of it at a time. With `served`, a server's address, (b) compares the probabilities of what is served there (as
    `served_model`, where there are several) instead (`compare_with_server`). Raises ValueError for input that cannot be read.
    """
    if stream and served is not None:
        raise ValueError("--stream is of transformers, --served takes a server instead: leave one out")
    server = None if served is None else Server.at(served, served_model)
    if stream:
        check_streaming()
    architecture, tensors = read_architecture(hf_path), HuggingFaceWeights(hf_path)
    tensors.check_files()
    stored = None if checkpoint is None else open_checkpoint(checkpoint)
    if stored is not None and stored.state.adapters is not None:
        raise ValueError(
            f"{stored.folder} holds adapters alone: export it with to-hf --merge, and verify what comes out"
        )
    parallel = parallel or ParallelSettings()
    if parallel.stage_layers(architecture.num_layers) is None:
        ends = parallel.uneven_ends(architecture.num_layers)
        if ends is None:
            raise ValueError(
                f"--pipeline={parallel.pipeline} is too much for the {architecture.num_layers} layers of {hf_path}: "
                f"use {architecture.num_layers} or less"
            )
        parallel = replace(parallel, first_stage_layers=ends[0], last_stage_layers=ends[1])
    start_processes()
    layout = create_layout(parallel, seed=0)

    def build(precision: Literal["fp32", "bf16"]) -> Model:
        settings = Settings(parallel=parallel)
        settings.training.precision = precision
        model = build_model(architecture, settings, layout, trainable=False)
        if stored is None:
            load_weights(model, hf_path)
        else:
            load_checkpoint(stored, model)
        model.train(False)
        return model

    model = build("fp32")
    differing = compare_tensors(model, tensors)
    if positions is None:
        positions = max(256, (architecture.sliding_window or 0) + 64)
    positions = min(positions, architecture.longest_sequence)
    texts = _texts(hf_path, architecture.vocabulary_size, positions, text)
    comparisons: Sequence[Comparison | ServedComparison]
    if server is None:
        comparisons = _compare_with_transformers(model, hf_path, texts, stream=stream)
    else:
        single = predict(model, texts)
        del model  # one of them at a time
        half = predict(build("bf16"), texts)
        comparisons, problems = [], []
        try:
            comparisons = compare_with_server(server, texts, single, half)  # the first rank's are all there is
        except ValueError as error:
            problems.append(str(error))
        agree_on_problems(problems)
    return broadcast_object(Verification(len(tensors.names()), differing, comparisons, factor), source=0)


def _compare_with_transformers(
    model: Model, hf_path: str, texts: Mapping[str, list[int]], *, stream: bool
) -> list[Comparison]:
    """On the first rank; the others get none. All ranks call it."""
    reference = Reference(hf_path, stream=stream) if model.layout.rank == 0 else None
    found = [compare(model, reference, name, tokens) for name, tokens in texts.items()]
    if reference is not None:
        reference.close()
    return [one for one in found if one is not None]


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
                    reason = _difference(tensors, tensor_name, value, rule.part)
                    # Of the parts of a tensor of all experts the first that differs.
                    found[tensor_name] = found.get(tensor_name) or reason
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


def _difference(tensors: HuggingFaceWeights, name: str, value: torch.Tensor, part: int | None) -> str | None:
    """How the tensor `name` of the folder, or that part of it, differs from `value` in its dtype; None if not at all."""
    if name not in tensors:
        return "is not in the folder"
    expected = tensors.slice(name)[:] if part is None else tensors.slice(name)[part]
    if expected.shape != value.shape:
        return f"has shape {list(value.shape)}, not {list(expected.shape)}"
    back = value.to(expected.dtype)
    if torch.equal(back.view(torch.uint8), expected.view(torch.uint8)):
        return None
    number = int((back != expected).sum())
    of_expert = "" if part is None else f"for expert {part} "
    return f"{of_expert}in {number:,} of {back.numel():,} numbers, by up to {(back.float() - expected.float()).abs().max():.3g}"


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
