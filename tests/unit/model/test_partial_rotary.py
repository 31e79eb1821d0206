"""RoPE on a part of each head, scaled as in LongRoPE, against transformers' Phi-3, whose fused tensors are taken apart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Phi3Config, Phi3ForCausalLM

from megatron_sstoken.config import ParallelSettings, Settings
from megatron_sstoken.model.families import Architecture, read_architecture, rope_inverse_frequencies
from tests.helpers.distributed_runner import run_distributed

HEADS, GROUPS, DIM, FRACTION = 4, 2, 16, 0.75
TURNED = 12  # of the 16
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.25 * number for number in range(TURNED // 2)],
    "long_factor": [4.0] * (TURNED // 2),
    "original_max_position_embeddings": 64,
}


def make_pair(folder: Path) -> tuple[Phi3ForCausalLM, Architecture]:
    """A Phi-3, and the architecture and folder of a Llama with the same weights; of it `rotary_fraction` is set by hand."""
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": HEADS * DIM, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "max_position_embeddings": 256}
    config = Phi3Config(
        **shape,
        rope_parameters=ROPE | {"partial_rotary_factor": FRACTION},
        pad_token_id=0,
        initializer_range=0.2,
        original_max_position_embeddings=64,
    )
    config._attn_implementation = "eager"
    model = Phi3ForCausalLM(config).eval()
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("qkv_proj.weight"):
            parts = value.split([HEADS * DIM, GROUPS * DIM, GROUPS * DIM])
            tensors |= {name.replace("qkv", which): part for which, part in zip("qkv", parts, strict=True)}
        elif name.endswith("gate_up_proj.weight"):
            gate, up = value.chunk(2)
            tensors |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            tensors[name] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    whole = ROPE | {"short_factor": [1.0] * (DIM // 2)}  # read for whole heads; the factors are put right below
    llama = {"model_type": "llama", "rms_norm_eps": config.rms_norm_eps, "rope_parameters": whole} | shape
    (folder / "config.json").write_text(json.dumps(llama))
    a = read_architecture(str(folder))
    assert a.rope_scaling is not None
    scaling = replace(a.rope_scaling, short_factors=tuple(ROPE["short_factor"]))
    return model, replace(a, rotary_fraction=FRACTION, rope_scaling=scaling)


def logits_of(rank: int, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's, and those of transformers."""
    from megatron_sstoken.model.attention import sample_bounds
    from megatron_sstoken.model.build import build_model, load_weights
    from megatron_sstoken.parallel import create_layout

    reference, architecture = make_pair(Path(folder))
    settings = Settings()
    settings.training.precision = "fp32"
    model = build_model(architecture, settings, create_layout(ParallelSettings(), seed=0), trainable=False)
    load_weights(model, folder)
    model.train(False)
    tokens, positions = torch.arange(5, 65).unsqueeze(0), torch.arange(60).unsqueeze(0)
    (chunk,) = model.unwrapped
    with torch.no_grad():
        found = chunk(tokens, positions, None, packed_seq_params=sample_bounds([60]))[0]
        return found[:, : architecture.vocabulary_size], reference(tokens).logits[0]


def test_frequencies_are_those_of_transformers(tmp_path):
    theirs, a = make_pair(tmp_path)
    assert a.rotary_dim == TURNED and a.rope_scaling is not None
    rotary = theirs.model.rotary_emb
    torch.testing.assert_close(rope_inverse_frequencies(a), rotary.inv_freq, rtol=1e-6, atol=0)
    assert a.rope_scaling.attention_factor == pytest.approx(rotary.attention_scaling)
    assert rotary.attention_scaling > 1.1


def test_logits_are_those_of_transformers(tmp_path):
    found, wanted = run_distributed(logits_of, 1, str(tmp_path))[0]
    assert (found - wanted).abs().max() < 2e-5
