"""Whether a layout, a precision and a batch fit a model and a number of processes.

Broken rules are collected as messages that name setting, value, rule and remedy.
"""

from itertools import chain

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import BatchShape, batch_shape
from megatron_sstoken.model.backend import Backend, preferred_backend, token_multiple
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.lora_targets import OF_MLP
from megatron_sstoken.parallel import processes_problem
from megatron_sstoken.validate.adapters import check_adapters, with_own_targets
from megatron_sstoken.validate.findings import Findings, divisors


def check_processes(settings: Settings, world_size: int, found: Findings) -> int:
    """Data parallel size; 0 if the processes cannot be divided."""
    parallel = settings.parallel
    product = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % product:
        found.problems.append(processes_problem(parallel, world_size))
        return 0
    stage = world_size // parallel.pipeline
    found.require(
        stage % parallel.expert == 0,
        f"parallel.expert={parallel.expert} does not divide the {stage} processes of a pipeline stage: "
        f"use {divisors(stage)}",
    )
    return world_size // product


def layout_problems(settings: Settings, architecture: Architecture, world_size: int) -> list[str]:
    """What keeps the layout and the batch of `settings` from fitting the model and the number of processes."""
    found = Findings([])
    data_size = check_processes(settings, world_size, found)
    check_split("model", architecture, settings, found)
    if settings.lora.rank:
        check_adapters(with_own_targets(settings, architecture), architecture, found)
    check_fp8(settings, architecture, found)
    check_windows("model", architecture, settings, preferred_backend(settings), found)
    if data_size and not found.problems:
        batch_shape_of(settings, data_size, found)
    return found.problems


def check_split(name: str, a: Architecture, settings: Settings, found: Findings) -> None:
    """Whether the layout and the sequence length fit `a`; `name` is what messages call it: model or history."""
    parallel = settings.parallel
    tensor = parallel.tensor
    widths = [("num_attention_heads", a.num_attention_heads), ("intermediate_size", a.ffn_hidden_size)]
    if a.shared_ffn_hidden_size:
        widths.append(("n_shared_experts × moe_intermediate_size", a.shared_ffn_hidden_size))
    if a.dense_layers:
        widths.append(("intermediate_size", a.dense_ffn_hidden_size))
    for field, number in widths:
        found.require(
            number % tensor == 0,
            f"parallel.tensor={tensor} does not divide {name}.{field}={number}: use {divisors(number)}",
        )
    groups = a.num_query_groups
    found.require(
        groups % tensor == 0 or tensor % groups == 0,
        f"parallel.tensor={tensor} neither divides nor is a multiple of {name}.num_key_value_heads={groups}: "
        f"use {divisors(groups)}",
    )
    found.require(
        not a.qk_norm_over_heads or groups % tensor == 0,
        f"parallel.tensor={tensor} does not divide {name}.num_key_value_heads={groups}, over all of which "
        f"{name}.model_type={a.family} normalises: use {divisors(groups)}",
    )
    if a.delta_net is not None:
        heads = a.delta_net.key_heads
        found.require(
            heads % tensor == 0,
            f"parallel.tensor={tensor} does not divide {name}.linear_num_key_heads={heads}: use {divisors(heads)}",
        )
    _check_stages(name, a, settings, found)
    offloaded = settings.training.offload_layers
    found.require(
        offloaded < a.num_layers,
        f"training.offload_layers={offloaded} is not below {name}.num_hidden_layers={a.num_layers}, and the last layer's "
        f"activations are needed at once: use {a.num_layers - 1} or less",
    )
    _check_experts(name, a, settings, found)
    owner = "the model" if name == "model" else f"the {name} model"
    found.require(
        settings.data.sequence_length <= a.longest_sequence,
        f"data.sequence_length={settings.data.sequence_length} is longer than {owner}'s {_longest(a)}: use "
        f"{a.longest_sequence} or less",
    )


def _longest(a: Architecture) -> str:
    """What bounds a sequence, in the words of config.json."""
    if a.longest_sequence == a.max_positions:
        return f"max_position_embeddings={a.max_positions}"
    beyond = "queries grow" if a.queries_grow else "longrope has other frequencies for all tokens"
    return f"original_max_position_embeddings={a.longest_sequence}, beyond which {beyond}"


def _check_stages(name: str, a: Architecture, settings: Settings, found: Findings) -> None:
    """Whether the layers can be dealt out to the pipeline stages and their chunks."""
    parallel = settings.parallel
    if parallel.stage_layers(a.num_layers) is not None:
        return
    given = {
        f"parallel.{field}={value}": value
        for field in ("first_stage_layers", "last_stage_layers")
        if (value := getattr(parallel, field)) is not None
    }
    if given:
        number = parallel.pipeline - len(given)
        others = {0: "no other stage", 1: "one other stage"}.get(number, f"{number} other stages")
        chunks = f", and every stage is split into parallel.virtual_pipeline={parallel.virtual_pipeline} equal chunks"
        found.problems.append(
            f"{' and '.join(given)} leave {a.num_layers - sum(given.values())} of {name}.num_hidden_layers={a.num_layers} "
            f"for {others} to share evenly{chunks if parallel.virtual_pipeline > 1 else ''}: use other numbers"
        )
        return
    product = parallel.pipeline * parallel.virtual_pipeline
    ends = parallel.uneven_ends(a.num_layers)
    uneven = ""
    if ends is not None:
        uneven = f", or parallel.first_stage_layers={ends[0]} and parallel.last_stage_layers={ends[1]}"
    found.problems.append(
        f"parallel.pipeline={parallel.pipeline} × parallel.virtual_pipeline={parallel.virtual_pipeline} = {product} "
        f"does not divide {name}.num_hidden_layers={a.num_layers}: use a product of {divisors(a.num_layers)}{uneven}"
    )


def _check_experts(name: str, a: Architecture, settings: Settings, found: Findings) -> None:
    """Whether the experts can be dealt out."""
    parallel = settings.parallel
    if not a.num_experts:
        found.require(
            parallel.expert == 1 or name != "model",
            f"parallel.expert={parallel.expert} needs a mixture of experts, which {name}.model_type={a.family} is not: "
            "use 1",
        )
        return
    found.require(
        a.num_experts % parallel.expert == 0,
        f"parallel.expert={parallel.expert} does not divide {name}.num_experts={a.num_experts}: "
        f"use {divisors(a.num_experts)}",
    )
    found.require(
        parallel.tensor == 1 or parallel.sequence,
        f"parallel.sequence=false with parallel.tensor={parallel.tensor} would compute the experts of every token "
        f"{parallel.tensor} times: use parallel.sequence=true",
    )
    trains_experts = name == "model" and (settings.lora.rank == 0 or {*OF_MLP} & {*settings.lora.targets})
    saves = settings.checkpoint.directory is not None and preferred_backend(settings) == "torch"
    if not (trains_experts and saves):
        return
    stages = parallel.chunk_layers(a.num_layers)
    dense = [str(stage) for stage, chunks in enumerate(stages) if not {*a.sparse_layers} & {*chain(*chunks)}]
    found.require(
        not dense,
        f"parallel.pipeline={parallel.pipeline} leaves stage {' and '.join(dense)} (from 0) no layer with experts, of which "
        f"{name}.model_type={a.family} has none in {', '.join(map(str, a.dense_layers))}, and the state of torch's optimizer "
        "can be saved only where every stage trains some: use other numbers of layers (parallel.first_stage_layers, "
        "last_stage_layers), or fewer stages",
    )


def check_fp8(settings: Settings, a: Architecture, found: Findings) -> None:
    """Whether FP8's tiles fit the matrices that a rank holds, and enough layers are left."""
    training, parallel = settings.training, settings.parallel
    if training.precision != "fp8":
        return
    multiple, tensor = token_multiple(training), parallel.tensor
    widths = {
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size // tensor,
        **_attention_widths(a, tensor),
        **_delta_net_widths(a, tensor),
    }
    for name, width in widths.items():
        found.require(
            width % multiple == 0,
            f"training.fp8_recipe={training.fp8_recipe} needs multiples of {multiple}; model.{name} leaves a rank "
            f"{width} with parallel.tensor={tensor}: use a smaller parallel.tensor or another recipe",
        )
    per_stage = a.num_layers // parallel.pipeline
    for name in ("fp8_first_bf16_layers", "fp8_last_bf16_layers"):
        value = getattr(training, name)
        found.require(
            value <= per_stage,
            f"training.{name}={value} is more than the {per_stage} layers of a pipeline stage: use {per_stage} or less",
        )


def _attention_widths(a: Architecture, tensor: int) -> dict[str, int]:
    """Sides of the matrices of a layer's attention, in the words of config.json → what a rank has of them."""
    queries, latents = a.num_attention_heads * a.head_dim, a.latents
    if latents is None:
        together, twice = a.query_rows + 2 * a.num_query_groups * a.head_dim, "2 · " if a.output_gate else ""
        return {
            "num_attention_heads × head_dim": queries // tensor,
            f"({twice}num_attention_heads + 2 · num_key_value_heads) × head_dim": together // tensor,
        }
    return {
        "num_attention_heads × (qk_nope_head_dim + qk_rope_head_dim)": queries // tensor,
        "num_attention_heads × (qk_nope_head_dim + v_head_dim)": a.num_attention_heads * latents.up_dim // tensor,
        "num_attention_heads × v_head_dim": a.num_attention_heads * latents.value_dim // tensor,
        "kv_lora_rank": latents.key_value,
        **({} if latents.query is None else {"q_lora_rank": latents.query}),
    }


def _delta_net_widths(a: Architecture, tensor: int) -> dict[str, int]:
    """The same of what stands in place of attention."""
    if (net := a.delta_net) is None:
        return {}
    made = "2 · linear_num_key_heads × linear_key_head_dim + 2 · linear_num_value_heads × (linear_value_head_dim + 1)"
    return {
        made: net.key_heads * sum(net.blocks) // tensor,
        "linear_num_value_heads × linear_value_head_dim": net.values // tensor,
    }


def check_windows(name: str, a: Architecture, settings: Settings, backend: Backend, found: Findings) -> None:
    """Whether context parallel can split attention to a sliding window.

    Transformer Engine's ring of keys and values knows no windows. Its other way deals out the heads (model/spec.py). Models
    with sinks do without its attention.
    """
    tensor, context = settings.parallel.tensor, settings.parallel.context
    if backend != "transformer_engine" or a.attention_sinks or context == 1 or not any(a.windowed_layers):
        return
    found.require(
        a.num_query_groups % (tensor * context) == 0,
        f"parallel.tensor={tensor} × parallel.context={context} = {tensor * context} does not divide "
        f"{name}.num_key_value_heads={a.num_query_groups}, which sliding windows on Transformer Engine need: use a product of "
        f"{divisors(a.num_query_groups)}, or model.backend=torch",
    )


def batch_shape_of(settings: Settings, data_size: int, found: Findings) -> BatchShape | None:
    training, parallel = settings.training, settings.parallel
    step = training.micro_batch_size * data_size
    if training.global_batch_size % step:
        near = sorted(
            {max(training.global_batch_size // step, 1) * step, -(-training.global_batch_size // step) * step}
        )
        found.problems.append(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size} × data parallel size {data_size} = {step}: "
            f"use {' or '.join(map(str, near))}"
        )
        return None
    num_micro_batches = training.global_batch_size // step
    found.require(
        parallel.virtual_pipeline == 1 or num_micro_batches % parallel.pipeline == 0,
        f"training.global_batch_size={training.global_batch_size} gives {num_micro_batches} micro-batches; the "
        f"interleaved schedule needs a multiple of parallel.pipeline={parallel.pipeline}: "
        f"use a multiple of {step * parallel.pipeline}",
    )
    return batch_shape(
        training.micro_batch_size,
        training.global_batch_size,
        data_size,
        tensor=parallel.tensor,
        context=parallel.context,
        sequence=parallel.sequence,
        tokens_multiple=token_multiple(training),
    )
