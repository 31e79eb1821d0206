"""Architecture and settings → the model chunks of this rank, wrapped for training."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_sstoken.compat import finalize_gradients, gather_in_next_pass, mark_split, silence_announcements
from megatron_sstoken.config import Settings
from megatron_sstoken.device import compute_device, have_cuda
from megatron_sstoken.model.attention import AttentionCapture
from megatron_sstoken.model.backend import accumulate_in_products
from megatron_sstoken.model.biases import let_experts_add_biases
from megatron_sstoken.model.dtypes import is_router_bias
from megatron_sstoken.model.families import Architecture, Split, table_frequencies
from megatron_sstoken.model.head import IGNORE_INDEX, HeadOptions, selective_head, vocabulary_parallel_loss
from megatron_sstoken.model.lora import adapted_modules, prepare_adapters
from megatron_sstoken.model.lora_embedding import adapt_embedding
from megatron_sstoken.model.lora_targets import EMBEDDING, expert_of, is_adapter, whole_parameters
from megatron_sstoken.model.rotary import PackedRotary
from megatron_sstoken.model.rows import HeadRows, head_rows
from megatron_sstoken.model.spec import block_spec
from megatron_sstoken.model.transformer_config import transformer_config
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import load_hugging_face, rules_of_chunk
from megatron_sstoken.parallel import Layout


class TokenLossModel(GPTModel):
    """GPTModel whose loss is per token, ignores the padded vocabulary and takes its group explicitly.

    With labels it returns fp32 [1, tokens], NaN where the label is `IGNORE_INDEX`, and a row for each of `head.signals`.
    """

    def __init__(self, *args, head: HeadOptions, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = head
        if not self.config.apply_rope_fusion:
            self.rotary_pos_emb: torch.nn.Module = PackedRotary(self.rotary_pos_emb)

    def forward(self, input_ids, position_ids, attention_mask, *, packed_seq_params, **kwargs):
        """megatron's, with the bounds of the samples (`SampleBounds`)."""
        if isinstance(self.rotary_pos_emb, PackedRotary):
            packed_seq_params = self.rotary_pos_emb.take_positions(position_ids, packed_seq_params)
        return super().forward(input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params, **kwargs)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels int64 [batch, tokens] and logits [tokens, batch, words / tensor size] → fp32 [batch, tokens]."""
        losses = vocabulary_parallel_loss(
            logits, labels.transpose(0, 1), self.head.vocabulary_size, self.pg_collection.tp
        )
        return losses.transpose(0, 1).masked_fill(labels == IGNORE_INDEX, torch.nan)

    def _postprocess(self, hidden_states, *, labels=None, packed_seq_params=None, **options):
        """megatron's last step of the forward pass; with the selective head, losses take the place of logits."""
        if self.post_process and self.head.logits_divisor != 1.0:
            hidden_states = hidden_states / self.head.logits_divisor
        if not self.head.selective or labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, packed_seq_params=packed_seq_params, **options)
        # The head stands in for the output layer, whose weight may still be on its way from the other data-parallel ranks.
        for wait_for_weights in self.output_layer._forward_pre_hooks.values():
            wait_for_weights(self.output_layer, ())
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The head returns the whole gradient on every rank: each takes its part, there is nothing left to sum.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return selective_head(
            hidden_states.squeeze(1),
            weight,
            labels[0],
            self.head.vocabulary_size,
            group,
            rows=packed_seq_params.head_rows,
            signals=self.head.signals,
            compiled=self.head.compiled,
        )


@dataclass
class Model:
    """What one rank holds of the model: a chunk for every virtual pipeline stage (one without interleaving)."""

    architecture: Architecture
    config: TransformerConfig
    layout: Layout
    unwrapped: list[TokenLossModel]
    """The chunks themselves."""

    chunks: list[torch.nn.Module] = field(default_factory=list)
    """The chunks as the schedules take them: with precision and data-parallel wrappers."""

    captures: list[AttentionCapture] = field(default_factory=list)
    """One attention capture for each chunk."""

    captured_layers: tuple[int, ...] = ()
    """Layer numbers (from 1) whose attention is captured."""

    scores_context: bool = False
    """Whether losses of context tokens are wanted, too."""

    trained_whole: frozenset[str] = frozenset()
    """Parameters of the base that are trained beside the adapters."""

    needs_calibration: bool = False
    """FP8's delayed recipe knows no scales yet: the first pass must be one that only finds them."""

    def head_rows(self, scored: np.ndarray) -> HeadRows | None:
        """Which rows of this rank's hidden states the head reads; None where it reads all.

        `scored`: bool [tokens of this context parallel rank], whether a token has a label.
        """
        if not self.unwrapped[-1].head.selective:
            return None
        if self.config.sequence_parallel:
            return head_rows(scored, self.layout.tensor_size, self.layout.tensor_rank)
        return head_rows(scored, 1, 0)

    def zero_gradients(self) -> None:
        """Empty megatron's gradient buffers, into which the backward passes of a step accumulate."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]  # a DistributedDataParallel

    def gather_weights(self) -> None:
        """Have all weights of the last step on this rank, of which the next forward pass would gather the other ranks' parts.

        To be called by all ranks before anything but a forward pass reads the weights.
        """
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def spread_weights(self) -> None:
        """Let the other ranks have this rank's part of the weights, which was written to: at once, or with their next pass.

        All ranks call it, between two passes.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:  # type: ignore[union-attr]  # a DistributedDataParallel
                gather_in_next_pass(chunk)
            else:
                chunk.start_param_sync()  # type: ignore[operator]

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, not the weights."""
        return any(True for _ in adapted_modules(self.unwrapped))

    def is_tuned(self, name: str) -> bool:
        """Whether a parameter of this name is what a run with adapters trains: of an adapter, or trained whole beside them."""
        return is_adapter(name) or name in self.trained_whole

    @contextmanager
    def adapters_off(self) -> Iterator["Model"]:
        """Within, the model computes what its base does; yields it as a model whose attention is not captured."""
        adapted = list(adapted_modules(self.unwrapped))
        for module in adapted:
            module.adapters_on = False
        try:
            yield replace(self, captured_layers=())
        finally:
            for module in adapted:
                module.adapters_on = True

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, all chunks are in evaluation mode; afterwards as they were."""
        was_training = self.chunks[0].training
        self.train(False)
        try:
            yield
        finally:
            self.train(was_training)

    def train(self, training: bool) -> None:
        """Switch all chunks between training and evaluation."""
        for chunk in self.chunks:
            chunk.train(training)


def build_model(
    architecture: Architecture,
    settings: Settings,
    layout: Layout,
    *,
    captured_layers: tuple[int, ...] = (),
    signals: tuple[str, ...] = (),
    trainable: bool,
    shapes_only: bool = False,
) -> Model:
    """Build this rank's chunks, with uninitialised weights. With `trainable`, wrap them in megatron's DDP.

    `captured_layers`: numbers from 1 of the layers whose attention to the context is captured. `signals`: what the
    head tells of every prediction beside its loss (`HeadOptions.signals`). `shapes_only`: parameters on the meta device, which
    take no memory (conversion asks only what they are called and how large they are).
    """
    silence_announcements()
    config = transformer_config(architecture, settings, layout)
    model = Model(
        architecture,
        config,
        layout,
        unwrapped=[],
        captured_layers=captured_layers,
        scores_context=settings.logging.context_loss,
        trained_whole=whole_parameters(settings.lora.train_whole),
        needs_calibration=bool(config.fp8) and config.fp8_recipe == "delayed",
    )
    selective, compiled = settings.model.head == "selective", settings.model.compiled_head
    head = HeadOptions(architecture.vocabulary_size, selective, signals, compiled, architecture.logits_divisor)
    for index in range(layout.virtual_pipeline):
        model.captures.append(AttentionCapture())
        with torch.device("meta") if shapes_only else nullcontext():
            chunk = _build_chunk(model, settings, head, index)
            if settings.lora.rank and EMBEDDING in settings.lora.targets and chunk.pre_process:
                adapt_embedding(chunk, settings.lora)
        rotary = chunk.rotary_pos_emb
        table = rotary.table if isinstance(rotary, PackedRotary) else rotary
        table.inv_freq = table_frequencies(architecture).to(compute_device())
        if architecture.embedding_multiplier != 1.0 and chunk.pre_process:
            chunk.embedding.register_forward_hook(partial(_multiplied, architecture.embedding_multiplier))
        if architecture.expert_bias:
            let_experts_add_biases(chunk)
        if not shapes_only:
            chunk.to(compute_device())
        _mark_tensor_parallel(chunk, architecture)
        if settings.lora.rank:
            full_recompute = settings.training.recompute == "full"
            prepare_adapters(chunk, settings.training.seed, model.trained_whole, full_recompute=full_recompute)
        model.unwrapped.append(chunk)
    model.chunks = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in model.unwrapped]
    for chunk in model.unwrapped:
        for name, buffer in chunk.named_buffers():
            if is_router_bias(name):  # not in bf16, as the wrapper has made all tensors
                buffer.data = buffer.data.float()
    if trainable:
        for chunk in model.unwrapped:
            accumulate_in_products(chunk.decoder)
        # Adapters are read by the linears that hold them, not by modules of their own, which is where megatron would wait.
        overlap_gather = have_cuda() and not settings.lora.rank
        model.chunks = _data_parallel(
            config, model.chunks, layout, settings.optimizer.gradient_dtype, overlap_gather=overlap_gather
        )
        config.finalize_model_grads_func = finalize_gradients
    return model


def _build_chunk(model: Model, settings: Settings, head: HeadOptions, index: int) -> TokenLossModel:
    """Model chunk number `index` of this rank."""
    config, layout, architecture = model.config, model.layout, model.architecture
    vp_stage = index if layout.virtual_pipeline > 1 else None
    last = layout.is_last_stage and index == layout.virtual_pipeline - 1
    return TokenLossModel(
        config=config,
        transformer_layer_spec=block_spec(
            config, architecture, model.captured_layers, model.captures[index], vp_stage, layout, settings.lora, last
        ),
        vocab_size=architecture.padded_vocabulary(settings.model.vocabulary_multiple, layout.tensor_size),
        max_sequence_length=architecture.max_positions,
        pre_process=layout.is_first_stage and index == 0,
        post_process=last,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_base,
        pg_collection=layout.groups,
        vp_stage=vp_stage,
        head=head,
    )


def _multiplied(factor: float, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook: the output times `factor`, rounded to its type first, as transformers does."""
    return output * torch.tensor(factor, dtype=output.dtype)


def _mark_tensor_parallel(chunk: TokenLossModel, architecture: Architecture) -> None:
    """Mark the parameters that differ between tensor ranks, as megatron does only while it draws random weights (0.16).

    Without the marks the gradient norm would count the first tensor rank's slices alone. Experts' gradients come from
    other tokens on every rank of a stage, tensor ranks included (their tokens are split by sequence parallel), so they
    are reduced over the expert data-parallel group; megatron arranges for that only with several expert ranks.
    """
    rules = rules_of_chunk(chunk, architecture)
    for name, parameter in chunk.named_parameters():
        of_adapter = is_adapter(name)
        split = Split.WHOLE if of_adapter else rules[name][0].split  # what is cut of adapters is marked
        of_expert = (expert_of(name) if of_adapter else rules[name][0].expert) is not None
        if of_expert:
            parameter.allreduce = False  # a mark of megatron's
            # megatron marks biases of experts as replicas whose gradients are to be summed over the tensor ranks.
            parameter.sequence_parallel = False
        if split is not Split.WHOLE or of_expert:
            mark_split(parameter, 1 if split is Split.COLUMNS else 0)


def _data_parallel(
    config, chunks, layout: Layout, gradient_dtype: str, *, overlap_gather: bool
) -> list[torch.nn.Module]:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradient_dtype == "fp32",  # otherwise gradients are of their parameter's type
        use_distributed_optimizer=True,
        overlap_grad_reduce=have_cuda(),
        overlap_param_gather=overlap_gather,
        check_for_nan_in_grad=False,  # the training step checks the global norm, once
    )
    wrapped = [
        DistributedDataParallel(
            config, replace(ddp_config), chunk, disable_bucketing=index > 0, pg_collection=layout.groups
        )
        for index, chunk in enumerate(chunks)
    ]
    config.no_sync_func = [chunk.no_sync for chunk in wrapped]
    config.grad_sync_func = None
    if len(wrapped) == 1:
        config.no_sync_func = config.no_sync_func[0]
    return wrapped


def load_weights(model: Model, hf_path: str) -> None:
    """Fill the model from a Hugging Face folder; each rank reads only its slices."""
    tensors = HuggingFaceWeights(hf_path)
    for chunk in model.unwrapped:
        load_hugging_face(chunk, tensors, model.architecture, model.layout.tensor_rank, model.layout.tensor_size)
