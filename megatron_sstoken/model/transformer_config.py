"""Architecture, settings and layout → megatron's configuration."""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_sstoken.config import Settings
from megatron_sstoken.device import have_cuda
from megatron_sstoken.model.backend import Backend, backend_of, fp8_options, fusion_options
from megatron_sstoken.model.dtypes import weight_dtype
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.rotary import multiply_rotated
from megatron_sstoken.parallel import Layout


def _quick_gelu(gate: torch.Tensor) -> torch.Tensor:
    """gate · sigmoid(1.702 gate). megatron's is compiled where it is first called, which takes a compiler and a second."""
    return gate * torch.sigmoid(1.702 * gate)


_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "quick_gelu": _quick_gelu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


def transformer_config(architecture: Architecture, settings: Settings, layout: Layout) -> TransformerConfig:
    """megatron's configuration for this architecture, layout, backend and precision."""
    a, parallel, training = architecture, settings.parallel, settings.training
    dtype = weight_dtype(training.precision)
    backend = backend_of(settings)
    # Transformer Engine's kernel knows of angles alone.
    attention_factor = a.rope_scaling.attention_factor if a.rope_scaling else 1.0
    recompute_settings: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    config = TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.dense_ffn_hidden_size or a.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_epsilon,
        activation_func=_ACTIVATIONS[a.activation],
        gated_linear_unit=True,
        add_bias_linear=a.expert_bias,
        add_qkv_bias=a.qkv_bias,
        layernorm_zero_centered_gamma=a.zero_centered_norms,
        qk_layernorm=a.qk_norm,
        attention_output_gate=a.output_gate,
        # Layers that are not alike are stored one by one.
        linear_attention_freq=[int(delta) for delta in a.delta_layers] or None,
        softmax_type="learnable" if a.attention_sinks else "vanilla",
        window_size=None if a.sliding_window is None else (a.sliding_window - 1, 0),
        window_attn_skip_freq=[int(windowed) for windowed in a.windowed_layers] or None,
        **_mixture_config(a, layout, backend),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in a.transformer_options},
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        # Of two stages one says it all; with both megatron divides by the number of the others, which is 0.
        num_layers_in_last_pipeline_stage=None
        if layout.pipeline_size == 2 and parallel.first_stage_layers is not None
        else parallel.last_stage_layers,
        context_parallel_size=layout.context_size,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # The weights are read from a checkpoint: nothing is drawn at random.
        perform_initialization=False,
        use_cpu_initialization=not have_cuda(),
        transformer_impl="local" if backend == "torch" else backend,
        **fusion_options(
            backend,
            fused_activation=a.activation == "silu",
            fused_rope=attention_factor == 1.0,
            fused_biases=not a.expert_bias,
        ),
        **fp8_options(training),
        # Σ over selected ÷ number selected in the global batch: megatron divides once, after the last micro-batch.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        cpu_offloading=training.offload_layers > 0,
        cpu_offloading_num_layers=training.offload_layers,
        # Interleaved chunks of two stages send each other two messages at a time. In one batch these would be taken for one
        # another, which Megatron-LM refuses; apart, they are taken in their order. The schedule that overlaps messages frees
        # tensors that are still being sent: streams allow that, gloo does not.
        overlap_p2p_comm=have_cuda() and parallel.virtual_pipeline > 1,
        batch_p2p_comm=have_cuda() and parallel.virtual_pipeline == 1,
        batch_p2p_sync=False,  # for old versions of torch
        **recompute_settings[training.recompute],
    )
    multiply_rotated(config, attention_factor)
    return config


def _mixture_config(a: Architecture, layout: Layout, backend: Backend) -> dict[str, Any]:
    """What a mixture of experts adds: every token goes to its experts, none is dropped, and no auxiliary loss."""
    if not a.num_experts:
        return {}
    return {
        "num_moe_experts": a.num_experts,
        "moe_ffn_hidden_size": a.ffn_hidden_size,
        "moe_router_topk": a.experts_per_token,
        "moe_layer_freq": [int(layer in a.sparse_layers) for layer in range(a.num_layers)] if a.dense_layers else 1,
        "moe_shared_expert_intermediate_size": a.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": a.shared_gate,
        "moe_router_enable_expert_bias": a.router_bias,
        "moe_router_bias_update_rate": 0.0,  # what balances experts in pretraining
        # The softmax over all experts, unless it is taken over the chosen ones, which is the same as renormalising.
        "moe_router_pre_softmax": not a.router_renormalizes,
        "moe_router_load_balancing_type": "none",
        # All experts of a rank in one product, by Transformer Engine; elsewhere one after another.
        "moe_grouped_gemm": backend == "transformer_engine",
        "moe_token_dispatcher_type": "alltoall" if have_cuda() else "allgather",  # the former wants CUDA streams
        "expert_model_parallel_size": layout.expert_size,
        "expert_tensor_parallel_size": 1,
    }
