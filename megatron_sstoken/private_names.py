"""The names of megatron-core, torch, Transformer Engine and transformers that we use and nobody promises to keep.

They are private or undocumented.

Plain data, which imports none of them. `tests/unit/test_private_names.py` looks each up in the installed versions, so that an
upgrade fails there and says what moved, and refuses a private name in our source that is not listed here.

Not listed: documented names, even where `device.py` replaces them on machines without CUDA.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """One name, and what leans on it."""

    module: str
    """The module of theirs that has it."""
    name: str
    """Within the module, with dots; the name alone where it is looked for in the text."""
    used_in: tuple[str, ...]
    """Files of ours, relative to the package."""
    why: str
    """What it is used for, and what we take for granted."""
    in_text: bool = False
    """Whether the name exists only on instances, as a mark or as a key: the module's source has to speak of it."""
    only_with: str | None = None
    """The package that has to be installed for it to exist."""


_BUILD, _LAST, _LORA = "model/build.py", "model/last_layer.py", "model/lora.py"
_TE_LORA = "model/lora_transformer_engine.py"
_MODEL_OPTIMIZER = "model/optimizer.py"
_STATE, _STORED, _CONTENTS = "checkpoint/optimizer_state.py", "conversion/torch_dist.py", "conversion/contents.py"
_MEGATRON = "megatron.core."
_LAYERS = "megatron.core.tensor_parallel.layers"
_GRADIENTS = "megatron.core.distributed.param_and_grad_buffer"
_DATA_PARALLEL = "megatron.core.distributed.distributed_data_parallel"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_STORE = "torch.distributed.checkpoint."

_MEGATRON_MODEL = (
    PrivateName(
        _MEGATRON + "models.gpt",
        "GPTModel._postprocess",
        (_BUILD,),
        "Overridden: the last step of forward, where losses take the place of logits. Called with keywords.",
    ),
    PrivateName(
        _MEGATRON + "models.gpt",
        "GPTModel.shared_embedding_or_output_weight",
        (_BUILD,),
        "The weight of a tied head.",
    ),
    *(
        PrivateName(
            _MEGATRON + "models.common.embeddings.yarn_rotary_pos_embedding",
            name,
            ("model/rotary.py",),
            "Set on the configuration from outside: what attention multiplies by where it turns queries and keys.",
            in_text=True,
        )
        for name in ("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim")
    ),
    PrivateName(
        _MEGATRON + "models.common.embeddings.rotary_pos_embedding",
        "inv_freq",
        (_BUILD,),
        "Set from outside: RoPE's frequencies as transformers computes them. Read anew in each forward pass.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "transformer.transformer_layer",
        "TransformerLayer._forward_attention",
        (_LAST,),
        "The first half of forward, called with its arguments; gives hidden states and the context of cross-attention.",
    ),
    PrivateName(
        _MEGATRON + "transformer.transformer_layer",
        "TransformerLayer._forward_mlp",
        (_LAST,),
        "The second half of forward, row by row, called with the hidden states that it is to compute.",
    ),
    PrivateName(
        _MEGATRON + "transformer.transformer_block",
        "get_num_layers_to_build",
        ("model/spec.py",),
        "How many layers this stage has; takes vp_stage and pp_rank.",
    ),
    PrivateName(
        _MEGATRON + "transformer.attention",
        "num_attention_heads_per_partition",
        ("model/latents.py",),
        "Heads of this rank.",
        in_text=True,
    ),
    *(
        PrivateName(_MEGATRON + "transformer.attention", name, ("model/gated_attention.py",), why, in_text=True)
        for name, why in (
            ("hidden_size_per_attention_head", "Numbers of a head."),
            ("num_query_groups_per_partition", "Query groups of this rank; 1 where several ranks share one."),
        )
    ),
    PrivateName(
        _MEGATRON + "transformer.attention",
        "SelfAttention._apply_output_gate",
        ("model/gated_attention.py",),
        "Overridden: attention's output times the sigmoid of what `get_query_key_value_tensors` gives fourth.",
    ),
    PrivateName(
        _MEGATRON + "transformer.attention",
        "k_layernorm",
        ("model/latents.py", "model/gated_attention.py"),
        "The norm of keys of heads, which forward looks at; None where there is none.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "transformer.utils",
        "is_layer_window_attention",
        ("model/attention.py", "model/spec.py"),
        "Whether a layer (numbers from 1) has the sliding window, as megatron's own attention asks.",
    ),
    PrivateName(
        _MEGATRON + "transformer.utils",
        "make_sharded_tensors_for_checkpoint",
        (_LORA, "model/attention.py", "model/delta_net.py"),
        "The checkpoint's entries of adapters, of sinks and of a delta net's own parameters.",
    ),
    PrivateName(
        _MEGATRON + "transformer.moe.moe_layer",
        "local_expert_indices",
        ("model/weights.py",),
        "The numbers of the experts that this rank holds, one after another.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "transformer.moe.experts",
        "SequentialMLP",
        ("model/biases.py",),
        "Experts one after another, as `local_experts`, each with a `linear_fc2` whose output and bias it adds in place.",
    ),
    PrivateName(
        _MEGATRON + "transformer.dot_product_attention",
        "softmax_offset",
        ("model/attention.py",),
        "What the sinks of heads are called in checkpoints.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "transformer.moe.moe_utils",
        "te_general_gemm",
        ("device.py",),
        "Set to None where the import of Transformer Engine did not define it; the router asks for it.",
        in_text=True,
    ),
    PrivateName(
        _LAYERS,
        "tp_group",
        (_LORA,),
        "The tensor parallel group of a parallel linear.",
        in_text=True,
    ),
    PrivateName(
        _LAYERS,
        "output_size_per_partition",
        (_LORA,),
        "Outputs of a column-parallel linear on this rank.",
        in_text=True,
    ),
    PrivateName(
        _LAYERS,
        "input_size_per_partition",
        (_LORA,),
        "Inputs of a row-parallel linear on this rank.",
        in_text=True,
    ),
)

_MEGATRON_MARKS = (
    PrivateName(
        _MEGATRON + "distributed.finalize_model_grads",
        "sequence_parallel",
        (_LORA, "model/norm.py", _BUILD),
        "Mark on a parameter whose gradient is summed over the tensor ranks; taken off biases of experts.",
        in_text=True,
    ),
    PrivateName(
        _DATA_PARALLEL,
        "allreduce",
        (_BUILD,),
        "Mark (False) on experts' parameters: their gradients are reduced over the expert data-parallel group.",
        in_text=True,
    ),
    PrivateName(
        _LAYERS,
        "tensor_model_parallel",
        ("compat.py",),
        "Mark on a parameter that differs between tensor ranks; the gradient norm counts the others once.",
        in_text=True,
    ),
    PrivateName(
        _GRADIENTS,
        "main_grad",
        ("model/head.py",),
        "A parameter's part of the fp32 gradient buffer, into which the head adds.",
        in_text=True,
    ),
    PrivateName(
        _DATA_PARALLEL,
        "grad_added_to_main_grad",
        ("model/head.py",),
        "Mark that the gradient autograd delivers must not be added again.",
        in_text=True,
    ),
    PrivateName(
        _LAYERS,
        "zero_out_wgrad",
        ("model/head.py",),
        "Mark on a weight that embedding and head share: the stand-in for its gradient must be zero.",
        in_text=True,
    ),
)

_MEGATRON_ON_CPU = (
    PrivateName(
        _MEGATRON + "tensor_parallel.random",
        "_get_cuda_rng_state",
        ("device.py",),
        "Replaced without CUDA: it reaches into torch._C.",
    ),
    PrivateName(
        _MEGATRON + "tensor_parallel.random",
        "_set_cuda_rng_state",
        ("device.py",),
        "Replaced without CUDA: it reaches into torch._C.",
    ),
    PrivateName(
        _GRADIENTS,
        "_coalescing_manager",
        ("device.py",),
        "Replaced without CUDA: gloo has no coalescing. Called with group and async_ops.",
    ),
    PrivateName(
        _GRADIENTS,
        "dist_reduce_scatter_func",
        ("device.py",),
        "Replaced without CUDA: gloo would copy all gradients three times. The output is a part of the input.",
    ),
    PrivateName(
        _GRADIENTS,
        "dist_all_gather_func",
        ("device.py",),
        "Replaced without CUDA, for the same reason. The input is a part of the output.",
    ),
)

_MEGATRON_STATE = (
    PrivateName(
        _OPTIMIZER,
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        (_STATE,),
        "Replaced while a state is made: called with the model's sharded state, is_loading and metadata.",
    ),
    PrivateName(
        _OPTIMIZER,
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        (_STATE,),
        "This rank's range of a parameter: fp32 copy under param, exp_avg, exp_avg_sq, and step, which is left out.",
    ),
    PrivateName(
        _OPTIMIZER,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        (_STATE,),
        "Copies such ranges into place.",
    ),
    PrivateName(
        _OPTIMIZER,
        "gbuf_ranges",
        (_MODEL_OPTIMIZER,),
        "For each buffer its buckets; their param_map says which range of which parameter this rank holds.",
        in_text=True,
    ),
    PrivateName(
        _OPTIMIZER,
        "model_param_group_index_map",
        (_MODEL_OPTIMIZER,),
        "Where the range of a parameter that this rank holds stands in the inner optimizer's groups.",
        in_text=True,
    ),
    PrivateName(
        _OPTIMIZER,
        "master_param",
        (_MODEL_OPTIMIZER,),
        "Key of fp32 weights in the state of optimizers that keep them there.",
        in_text=True,
    ),
    PrivateName(
        _GRADIENTS,
        "param_gather_dispatched",
        ("compat.py",),
        "Of a group of buckets: whether the next forward pass finds its weights gathered. Set to False where they are not.",
        in_text=True,
    ),
    PrivateName(
        _GRADIENTS,
        "param_gather_handle",
        ("compat.py",),
        "Of a group of buckets: what waits for its weights, None once they are there.",
        in_text=True,
    ),
    PrivateName(
        _DATA_PARALLEL,
        "expert_parallel_bucket_groups",
        ("compat.py",),
        "The groups of buckets of experts' weights, beside `bucket_groups` of all others.",
        in_text=True,
    ),
    PrivateName(
        _OPTIMIZER,
        "HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers",
        (_STATE,),
        "Takes over state that was loaded, where a part of the optimizer lives on the CPU.",
    ),
    PrivateName(
        _OPTIMIZER,
        "param_state",
        (_STATE,),
        "Key of the optimizer's tensors in its state.",
        in_text=True,
    ),
    PrivateName(
        _OPTIMIZER,
        "distrib_optim_sharding_type",
        (_STATE,),
        "Key of the metadata that chooses the form which moves between layouts, fully_reshardable.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "optimizer.optimizer",
        "chained_optimizers",
        (_MODEL_OPTIMIZER,),
        "The optimizers that a mixture of experts has two of.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "optimizer_param_scheduler",
        "get_canonical_lr_for_logging",
        ("training/loop.py",),
        "The learning rate for the log.",
    ),
    PrivateName(
        _MEGATRON + "dist_checkpointing.dict_utils",
        "nested_values",
        (_CONTENTS, _STATE),
        "All entries of a nested state.",
    ),
    PrivateName(
        _MEGATRON + "dist_checkpointing.core",
        "CheckpointingConfig",
        (_STORED,),
        "What metadata.json says, for checkpoints that we write without megatron.",
    ),
    PrivateName(
        _MEGATRON + "dist_checkpointing.strategies.filesystem_async",
        "_results_queue",
        ("checkpoint/writer.py",),
        "The queue of the process beside each rank that saving asks for, where it is not None.",
    ),
    PrivateName(
        _MEGATRON + "dist_checkpointing.strategies.async_utils",
        "preload_fn",
        ("checkpoint/writer.py",),
        "Of an AsyncRequest: copies what lies on a GPU, and takes the place of the second argument of async_fn.",
        in_text=True,
    ),
    PrivateName(
        _MEGATRON + "dist_checkpointing.core",
        "save_config",
        (_STORED,),
        "Writes metadata.json.",
    ),
)

_TORCH = (
    PrivateName(
        "torch.nn.modules.module",
        "_forward_pre_hooks",
        (_BUILD,),
        "megatron's hooks on the output layer, which wait for its weight; called in its place by the head that reads it.",
        in_text=True,
    ),
    PrivateName(
        "torch.utils._device",
        "_device_constructors",
        ("device.py",),
        "Called before torch's factories are replaced: a list, made at first use, that knows them by identity.",
    ),
    PrivateName(
        "torch.distributed.distributed_c10d",
        "_world.pg_map",
        ("parallel.py",),
        "All process groups, to destroy those that megatron forgets.",
    ),
    PrivateName(
        "torch._C._distributed_c10d",
        "_dump_nccl_trace",
        ("watchdog.py",),
        "torch's flight recorder as bytes, which NCCL's watchdog would write into the same file.",
        only_with="nvidia",
    ),
    PrivateName(
        "torch.distributed.elastic.agent.server.local_elastic_agent",
        "LocalElasticAgent._monitor_workers",
        ("launch.py",),
        "Overridden: the look at the processes, after which the agent restarts them or gives up.",
    ),
    PrivateName(
        "torch.distributed.elastic.agent.server.api",
        "_remaining_restarts",
        ("launch.py",),
        "Set to 0 where a restart cannot help.",
        in_text=True,
    ),
    PrivateName(
        "torch.distributed.launcher.api",
        "LocalElasticAgent",
        ("launch.py",),
        "Replaced by our agent: launch_agent has no argument for it.",
    ),
    PrivateName(
        "torch._subclasses.fake_tensor",
        "FakeTensorMode",
        (_STORED,),
        "torch.load without reading the bytes, where torch does not tell their place for the meta device.",
    ),
    PrivateName(
        "torch",
        "UntypedStorage._checkpoint_offset",
        (_STORED,),
        "Where in the file the bytes of a tensor lie that was loaded without them.",
    ),
    PrivateName(
        _STORE + "filesystem",
        "_StorageInfo",
        (_STORED,),
        "File, start and length of a stored piece: what .metadata is made of.",
    ),
    PrivateName(
        _STORE + "filesystem",
        "_StorageInfo.transform_descriptors",
        (_STORED,),
        "Tells of compressed pieces, which are refused.",
    ),
    PrivateName(
        _STORE + "filesystem",
        "FileSystemWriter.storage_meta",
        (_STORED,),
        "Overridden: it would put a random number into .metadata.",
    ),
    PrivateName(
        _STORE + "utils",
        "_create_file_view",
        (_STORED,),
        "One piece of a data file as a file.",
    ),
    PrivateName(
        _STORE + "planner_helpers",
        "create_read_items_for_chunk_list",
        (_STORED,),
        "Which stored pieces make up a wanted tensor.",
    ),
    PrivateName(
        "torch.optim.adam",
        "exp_avg_sq",
        (_STATE,),
        "Key of AdamW's state, with step and exp_avg: made before the first step, which megatron asserts.",
        in_text=True,
    ),
)

_TRANSFORMER_ENGINE = (
    PrivateName(
        _MEGATRON + "extensions.transformer_engine",
        "HAVE_TE",
        ("model/backend.py",),
        "Whether megatron could import Transformer Engine.",
    ),
    PrivateName(
        _MEGATRON + "utils",
        "get_te_version",
        ("model/backend.py",),
        "The version that megatron sees.",
    ),
    PrivateName(
        _MEGATRON + "extensions.transformer_engine",
        "TENorm",
        ("model/spec.py",),
        "The final norm of a model of Transformer Engine's layers.",
    ),
    PrivateName(
        "transformer_engine.pytorch.module.layernorm_linear",
        "layer_norm_weight",
        ("model/weights.py",),
        "The name of the norm's weight inside the linear that follows it.",
        in_text=True,
        only_with="transformer_engine",
    ),
    PrivateName(
        "transformer_engine.pytorch.module.layernorm_linear",
        "return_layernorm_output",
        ("model/lora_transformer_engine.py",),
        "Set on a linear before each forward pass: whether it gives the output of its norm, too.",
        in_text=True,
        only_with="transformer_engine",
    ),
    PrivateName(
        "transformer_engine.pytorch.module.base",
        "fuse_wgrad_accumulation",
        ("model/backend.py",),
        "Set on linears after they are made: whether gradients of weights are added to main_grad within the product.",
        in_text=True,
        only_with="transformer_engine",
    ),
)

_CHAT_TEMPLATES = "transformers.utils.chat_template_utils"
_TRANSFORMERS = (
    PrivateName(
        _CHAT_TEMPLATES,
        "_compile_jinja_template",
        ("data/tokenizer.py",),
        "The template in transformers' sandbox, compiled once, without the copying of messages that it does around it.",
    ),
    PrivateName(
        _CHAT_TEMPLATES,
        "_render_with_assistant_indices",
        ("data/tokenizer.py",),
        "The same with the spans of generation marks.",
    ),
    PrivateName(
        "argparse",
        "ArgumentDefaultsHelpFormatter._get_help_string",
        ("tool.py",),
        "Defaults in `--help` without those that say nothing, such as None.",
    ),
)

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    *_MEGATRON_MODEL,
    *_MEGATRON_MARKS,
    *_MEGATRON_ON_CPU,
    *_MEGATRON_STATE,
    *_TORCH,
    *_TRANSFORMER_ENGINE,
    *_TRANSFORMERS,
)
"""All of them, by owner and purpose."""
