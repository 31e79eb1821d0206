"""Whether a checkpoint is of the model that a run trains, told by the sizes of its tensors before anything is loaded."""

from megatron_sstoken.checkpoint.manifest import Checkpoint
from megatron_sstoken.model.families import Architecture

_LAYERS = "decoder.layers."


def other_model(checkpoint: Checkpoint, architecture: Architecture, hf_path: str) -> str | None:
    """What differs between the model of a checkpoint and that of `hf_path`, for people; None where nothing is found.

    Adapters have none of these tensors: they name their base by its fingerprint.
    """
    try:
        a, stored = architecture, checkpoint.metadata.state_dict_metadata
    except ValueError:  # told where it is read
        return None
    rows = a.query_rows + 2 * a.num_query_groups * a.head_dim
    expected = {
        f"{_LAYERS}self_attention.linear_qkv.weight": (a.num_layers, rows, a.hidden_size),
        f"{_LAYERS}self_attention.linear_proj.weight": (
            a.num_layers,
            a.hidden_size,
            a.num_attention_heads * a.value_dim,
        ),
    }
    if not a.num_experts:
        expected[f"{_LAYERS}mlp.linear_fc1.weight"] = (a.num_layers, 2 * a.ffn_hidden_size, a.hidden_size)
    for name, size in expected.items():
        found = tuple(getattr(stored.get(name), "size", ()))
        if found and found != size:
            return (
                f"it is of another model ({checkpoint.state.hf_path}): {name} is {_times(found)} there, and {_times(size)} in "
                f"model.hf_path={hf_path}"
            )
    return None


def _times(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))
