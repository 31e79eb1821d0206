"""config.json of each family, old and new, against transformers' own reading of it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_sstoken.model.families import (
    family_of,
    parse_architecture,
    read_architecture,
    register,
    rope_inverse_frequencies,
    table_frequencies,
)
from tests.helpers.workbench import FAMILIES, names_on_disk, part_name, tiny_config

LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "pretraining_tp": 1,
    "use_cache": True,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = LLAMA2 | {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_SCALING,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3_NEW = {name: value for name, value in LLAMA3.items() if name not in ("rope_theta", "rope_scaling")} | {
    "rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + number / 8 for number in range(16)],
    "long_factor": [8.0 + number for number in range(16)],
    "original_max_position_embeddings": 4096,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
MISTRAL = LLAMA2 | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4096}
QWEN3 = {name: value for name, value in QWEN2.items() if name != "max_window_layers"} | {
    "model_type": "qwen3",
    "head_dim": 32,
    "attention_bias": False,
}
MIXTRAL = LLAMA2 | {
    "model_type": "mixtral",
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": False,
    "sliding_window": None,
    "rope_theta": 1e6,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
SMOLLM3 = LLAMA2 | {
    "model_type": "smollm3",
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "mlp_bias": False,
    "no_rope_layer_interval": 2,
    "pad_token_id": 0,
    "rope_theta": 5e6,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
PHI4_MINI = LLAMA2 | {
    "model_type": "phi3",
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 1024,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2, 3, 4, 5], "long_factor": [1.0, 2, 3, 4, 5, 6]},
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.1,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
GRANITE = LLAMA2 | {
    "model_type": "granite",
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "residual_multiplier": 0.22,
}
GEMMA3 = {name: value for name, value in LLAMA2.items() if name not in ("hidden_act", "rope_scaling")} | {
    "model_type": "gemma3_text",
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 168,
    "rope_local_base_freq": 20000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 500000,
    "sliding_window": 1024,
    "sliding_window_pattern": 2,
    "pad_token_id": 0,
}
OLMO3 = LLAMA2 | {
    "model_type": "olmo3",
    "num_hidden_layers": 4,
    "rope_theta": 500000,
    "rope_scaling": YARN,
    "pad_token_id": 0,
    "sliding_window": 64,
}
GLM4_MOE = LLAMA2 | {
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": True,
    "use_qk_norm": False,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
}
GPT_OSS = {  # as OpenAI's folders have it, smaller and in bf16
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 256,
    "intermediate_size": 48,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 256,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 64,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 320,
}
DEEPSEEK_V3 = {  # as DeepSeek's folders have it, smaller and in bf16
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 24,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 48,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "v_head_dim": 12,
    "vocab_size": 320,
}
QWEN3_NEXT = {  # as Qwen's folder has it, smaller
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 24,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 24,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 320,
}
QWEN3_5_TEXT = {  # as the text_config of Qwen's folders has it, smaller
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 160,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 16,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "vocab_size": 320,
}
CONFIGS = {
    "qwen3-next": QWEN3_NEXT,
    "qwen3-next-some-dense": QWEN3_NEXT | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    "qwen3.5": QWEN3_5_TEXT,
    "qwen3.5-of-one-kind": QWEN3_5_TEXT | {"layer_types": ["full_attention"] * 4},
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-without-query-latents": DEEPSEEK_V3 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "kimi-k2": DEEPSEEK_V3
    | {
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 2.827,
        "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        "rope_theta": 50000.0,
    },
    "gpt-oss": GPT_OSS,
    "gpt-oss-without-rope": GPT_OSS | {"rope_scaling": None, "layer_types": None},
    "phi4-mini": PHI4_MINI,
    "phi3-su": PHI4_MINI
    | {"rope_scaling": PHI4_MINI["rope_scaling"] | {"type": "su", "original_max_position_embeddings": 1024}},
    "granite": GRANITE,
    "gemma3": GEMMA3,
    "olmo3": OLMO3,
    "glm4-moe": GLM4_MOE,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "qwen3-moe": QWEN3_MOE,
    "llama2": LLAMA2,
    "llama2-linear": LLAMA2 | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama2-both": LLAMA2
    | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama2-biases": LLAMA2 | {"attention_bias": True, "mlp_bias": True},
    "llama2-dynamic": LLAMA2 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3-without-length": LLAMA3
    | {
        "rope_scaling": {
            name: value for name, value in LLAMA3_SCALING.items() if name != "original_max_position_embeddings"
        }
    },
    "llama3-length-outside": LLAMA3 | {"original_max_position_embeddings": 64},
    "llama3-yarn": LLAMA3 | {"rope_scaling": YARN},
    "llama3-yarn-bounds": LLAMA3 | {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2.0, "truncate": False}},
    "llama3-yarn-scales": LLAMA3 | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    "llama3-yarn-attention": LLAMA3 | {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama3-yarn-ratio": LLAMA3 | {"rope_scaling": YARN | {"factor": None}},
    "llama3-longrope": LLAMA3 | {"rope_scaling": LONGROPE},
    "llama3-longrope-factor": LLAMA3 | {"rope_scaling": LONGROPE | {"factor": 2.0}},
    "llama3-old": LLAMA3,
    "llama3-new": LLAMA3_NEW,
    "qwen2": QWEN2,
    "smollm3": SMOLLM3,
    "qwen2-untied": QWEN2 | {"tie_word_embeddings": False, "num_key_value_heads": 8},
} | {f"tiny-{name}": tiny_config(name).to_dict() for name in FAMILIES}


@pytest.fixture
def folder(tmp_path):
    """A function: write this config.json and return its folder."""

    def write(config, name="model") -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return write


def num_experts(config):
    """Of a transformers configuration."""
    return getattr(config, "n_routed_experts", getattr(config, "num_experts", 0))


def full_rope(config):
    """The rope parameters of layers without a window."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_those_of_transformers(folder, name):
    path = folder(CONFIGS[name])
    a, theirs = read_architecture(path), AutoConfig.from_pretrained(path)
    assert a.family == theirs.model_type
    assert (a.hidden_size, a.num_layers, a.ffn_hidden_size) == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
    )
    assert (a.num_experts, a.experts_per_token) == (
        num_experts(theirs),
        getattr(theirs, "num_experts_per_tok", 0),
    )
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    head_dim = getattr(theirs, "qk_head_dim", head_dim)
    assert (a.num_attention_heads, a.num_query_groups, a.head_dim) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        head_dim,
    )
    assert (a.vocabulary_size, a.max_positions) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert (a.norm_epsilon, a.rope_base) == (theirs.rms_norm_eps, full_rope(theirs)["rope_theta"])
    assert a.tied_embeddings is theirs.tie_word_embeddings
    assert a.qkv_bias is (theirs.model_type == "qwen2" or getattr(theirs, "attention_bias", False))
    assert (a.output_bias, a.mlp_bias) == (
        getattr(theirs, "attention_bias", False) and "glm4" not in theirs.model_type,
        getattr(theirs, "mlp_bias", False),
    )
    normalised = theirs.model_type.startswith(("qwen3", "olmo", "gemma"))
    assert a.qk_norm is (normalised or getattr(theirs, "use_qk_norm", False))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_own_meaning_of_absent_fields(folder, family):
    essential = {"vocab_size": 320, "num_hidden_layers": 3, "intermediate_size": 172}
    wide = {"hidden_size": 512, "num_attention_heads": 128}  # what their defaults of groups divide
    experts = family_of(family).experts
    # transformers has a default for the number of experts; where ours has none, the config names it.
    named = {} if experts is None or set(experts.count) & family_of(family).absent.keys() else {"num_experts": 8}
    path = folder({"model_type": family} | essential | wide | named)
    a, theirs = read_architecture(path), AutoConfig.from_pretrained(path)
    assert (a.num_query_groups, a.max_positions) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert a.head_dim == getattr(theirs, "qk_head_dim", getattr(theirs, "head_dim", None) or 4)
    assert (a.norm_epsilon, a.rope_base) == (theirs.rms_norm_eps, full_rope(theirs)["rope_theta"])
    assert (a.sliding_window, a.tied_embeddings) == (
        getattr(theirs, "sliding_window", None),
        theirs.tie_word_embeddings,
    )
    assert a.experts_per_token == getattr(theirs, "num_experts_per_tok", 0)
    assert a.router_renormalizes is getattr(theirs, "norm_topk_prob", True)
    if a.num_experts:
        assert (a.num_experts, a.ffn_hidden_size) == (
            num_experts(theirs),
            getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
        )


def test_windows_are_where_transformers_puts_them(folder):
    a = read_architecture(folder(MISTRAL | {"sliding_window": 64}))
    assert (a.sliding_window, a.windowed_layers) == (64, (True,) * 3)
    switched = QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    path = folder(switched)
    theirs = AutoConfig.from_pretrained(path)
    a = read_architecture(path)
    assert a.sliding_window == theirs.sliding_window == 64
    assert [("full_attention", "sliding_attention")[windowed] for windowed in a.windowed_layers] == theirs.layer_types
    for none in (MISTRAL | {"sliding_window": None}, switched | {"max_window_layers": 2}, QWEN2):
        a = read_architecture(folder(none))
        assert (a.sliding_window, a.windowed_layers) == (None, ())
    listed = switched | {"layer_types": ["sliding_attention", "full_attention"]}
    assert read_architecture(folder(listed)).windowed_layers == (True, False)


@pytest.mark.parametrize(
    "field",
    [
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "hidden_act",
    ],
)
def test_absent_fields_mean_what_they_mean_in_transformers(folder, field):
    path = folder({name: value for name, value in LLAMA3.items() if name != field})
    a, theirs = read_architecture(path), AutoConfig.from_pretrained(path)
    assert (a.num_query_groups, a.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (a.max_positions, a.norm_epsilon) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert a.rope_base == theirs.rope_parameters["rope_theta"]
    assert (a.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")
    assert a.tied_embeddings is theirs.tie_word_embeddings


def test_old_and_new_rope_are_one(folder):
    assert read_architecture(folder(LLAMA3, "old")) == read_architecture(folder(LLAMA3_NEW, "new"))
    typed = {("type" if name == "rope_type" else name): value for name, value in LLAMA3_SCALING.items()}
    assert read_architecture(folder(LLAMA3 | {"rope_scaling": typed}, "typed")) == read_architecture(
        folder(LLAMA3, "old")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_rope_frequencies_are_those_of_transformers(folder, name):
    path = folder(CONFIGS[name])
    architecture = read_architecture(path)
    found = table_frequencies(architecture)
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    theirs = vars(buffers := kind(config)) | dict(buffers.named_buffers())
    prefixes = ("full_attention_", "sliding_attention_") if architecture.window_rope_base else ("",)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.cat([theirs[f"{one}inv_freq"] for one in prefixes]), rtol=1e-6, atol=0)
    scaling = architecture.rope_scaling
    factors = [scaling.attention_factor if scaling else 1.0, 1.0][: len(prefixes)]
    assert factors == pytest.approx([theirs[f"{one}attention_scaling"] for one in prefixes], rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 8.0)])
def test_llama3_rope_has_all_three_regimes(folder, low, high):
    borders = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": 64}
    path = folder(LLAMA3 | {"rope_scaling": LLAMA3_SCALING | borders})
    found = rope_inverse_frequencies(read_architecture(path))
    plain = rope_inverse_frequencies(read_architecture(folder(LLAMA3 | {"rope_scaling": None}, "plain")))
    wanted = LlamaRotaryEmbedding(AutoConfig.from_pretrained(path)).inv_freq
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    ratio = plain / found
    assert (ratio == 1).any() and torch.isclose(ratio, torch.tensor(32.0)).any()
    assert ((ratio > 1.01) & (ratio < 31.9)).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_parameters(folder, name):
    path = folder(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert read_architecture(path).num_parameters() == sum(p.numel() for p in model.parameters())


def test_numbers_of_parameters_are_the_published_ones():
    """DeepSeek-V3: 671B, 37B of them for each token (arXiv 2412.19437); Kimi K2: 1T and 32B (arXiv 2507.20534).

    Qwen3-Next: 80B and 3B, 79B of them without embeddings (its model card).
    """
    deepseek = {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61}
    kimi = {"vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
    kimi |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    for config, whole, active in (({"num_attention_heads": 128}, 671, 37), (kimi, 1026, 32)):
        a = parse_architecture(deepseek | config, "config.json")
        assert (a.num_parameters() // 10**9, a.num_active_parameters() // 10**9) == (whole, active)
    qwen = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48}
    a = parse_architecture({"model_type": "qwen3_next"} | qwen, "config.json")
    embeddings = 2 * a.vocabulary_size * a.hidden_size
    found = a.num_parameters(), a.num_parameters() - embeddings, a.num_active_parameters() - embeddings
    assert [round(number / 1e9) for number in found] == [80, 79, 3]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_one_rule(folder, name):
    path = folder(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    a = read_architecture(path)
    covered = [
        part_name(pattern.format(layer=layer), rule.part)
        for rule in a.weight_rules()
        for pattern in rule.hugging_face
        for layer in rule.layers(a)
    ]
    buffers = [name for name, _ in model.named_buffers() if name.endswith("bias")]
    assert sorted(covered) == sorted([*names_on_disk(path, dict(model.named_parameters())), *buffers])


@pytest.mark.parametrize(
    ("words", "multiple", "tensor", "padded"),
    [
        (320, 128, 1, 384),
        (320, 128, 8, 384),
        (320, 128, 3, 384),
        (320, 1, 1, 320),
        (320, 1, 3, 321),
        (384, 128, 2, 384),
        (385, 128, 2, 512),
        (32000, 128, 256, 32000),
        (99, 10, 4, 100),
    ],
)
def test_padded_vocabulary(folder, words, multiple, tensor, padded):
    a = read_architecture(folder(LLAMA2 | {"vocab_size": words}))
    assert a.padded_vocabulary(multiple, tensor) == padded
    assert padded % multiple == padded % tensor == 0


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA2, {"use_sliding_window": True}, "use_sliding_window=True is not supported: only False is"),
        (LLAMA2, {"sliding_window": 64}, "sliding_window=64 is not supported: only None is"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported: only \[\] is"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported: only 1 is"),
        (QWEN3_MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 of num_experts=8 is not possible"),
        (QWEN3_MOE, {"n_shared_experts": 1}, "the field n_shared_experts=1 is not known"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported: only 0.0 is"),
        (LLAMA2, {"num_local_experts": 4}, "the field num_local_experts=4 is not known"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] is not supported: a 1 \(RoPE\) or 0 for each"),
        (SMOLLM3, {"no_rope_layers": [2] * 5}, r"no_rope_layers=\[2, 2, 2, 2, 2\] is not supported"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is not supported: use a number from 1 on"),
        (
            SMOLLM3,
            {"sliding_window": 64, "layer_types": ["sliding_attention"] * 5},
            "layer_types names sliding_attention without a window: set use_sliding_window",
        ),
        (LLAMA2, {"no_rope_layers": [1, 0, 1]}, "the field no_rope_layers=.* is not known"),
        (GRANITE, {"logit_scale": 2.0}, "the field logit_scale=2.0 is not known"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported: only None is"),
        (GEMMA3, {"sliding_window": None}, "sliding_window=None is not supported: a number is"),
        (
            GEMMA3,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters=.* is not supported: only one of full_attention and sliding_attention is",
        ),
        (
            OLMO3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
            "rope type 'linear' of sliding_attention is not supported: only 'default' is",
        ),
        (
            LLAMA2,
            {"model_type": "kimi_k2"},
            "model_type='kimi_k2' is not supported, for transformers knows such models as deepseek_v3 alone, and",
        ),
        (
            QWEN3_5_TEXT,
            {"model_type": "qwen3_5"},
            "model_type='qwen3_5' is not supported, for it reads images, too: qwen3_5_text, its text model alone, is",
        ),
        (QWEN3_NEXT, {"linear_num_key_heads": 3}, "linear_num_key_heads=3 does not divide linear_num_value_heads=4"),
        (
            QWEN3_NEXT,
            {"linear_conv_kernel_dim": 0},
            "linear_conv_kernel_dim=0 is not possible: only a whole number from",
        ),
        (
            QWEN3_NEXT,
            {"decoder_sparse_step": 7},
            r"decoder_sparse_step=7 and mlp_only_layers=\[\] leave no layer experts",
        ),
        (QWEN3_NEXT, {"mlp_only_layers": "0"}, "mlp_only_layers='0' is not possible: only a list of layers"),
        (
            QWEN3_NEXT,
            {"full_attention_interval": "4"},
            "full_attention_interval='4' is not possible: only a whole number",
        ),
        (QWEN3_NEXT, {"attn_output_gate": False}, "attn_output_gate=False is not supported: only True is"),
        (QWEN3_NEXT, {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16' is not supported: only 'float32' is"),
        (QWEN3_5_TEXT, {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported: only \[\] is"),
        (
            QWEN3_5_TEXT,
            {"layer_types": ["sliding_attention"] * 4},
            r"layer_types=\[.*\] is not supported: one of full_attention and linear_attention for each of num_hidden_layers=4",
        ),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias=True is not supported: only False is"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method='greedy' is not supported: only 'noaux_tc' is"),
        (DEEPSEEK_V3, {"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported: only 4 is"),
        (DEEPSEEK_V3, {"head_dim": 16}, "head_dim=16 is not supported: only 8 is, which the other sizes say"),
        (DEEPSEEK_V3, {"norm_topk_prob": None}, "norm_topk_prob=None is not supported: only True is"),
        (DEEPSEEK_V3, {"kv_lora_rank": 1.5}, "kv_lora_rank=1.5 is not possible: only a whole number from 1 on is"),
        (
            DEEPSEEK_V3,
            {"topk_group": 1, "num_experts_per_tok": 2, "n_group": 3},
            "n_group=3 with topk_group=1 is not possible for num_experts_per_tok=2 of n_routed_experts=8: groups are equal",
        ),
        (DEEPSEEK_V3, {"topk_group": 1}, "n_group=4 with topk_group=1 is not possible for num_experts_per_tok=4"),
        (
            DEEPSEEK_V3,
            {"num_experts_per_tok": 3},
            "topk_group=2 of n_group=4 with num_experts_per_tok=3 is not supported: megatron ranks groups by their best 1",
        ),
        (
            DEEPSEEK_V3,
            {"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}},
            "mscale_all_dim=1.0 is not possible without the factor of the rope scaling: add it",
        ),
        (
            LLAMA2,
            {
                "model_type": "ministral3",
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "rope type 'default' is not supported: only 'yarn' is",
        ),
        (
            LLAMA2,
            {"model_type": "ministral3", "num_key_value_heads": 2, "rope_parameters": YARN | {"rope_theta": 1e4}},
            "llama_4_scaling_beta=None is not supported: a number",
        ),
        (GPT_OSS, {"attention_bias": False}, "attention_bias=False is not supported: only True is"),
        (GPT_OSS, {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported: only 1.702 is"),
        (GPT_OSS, {"swiglu_limit": None}, "swiglu_limit=None is not possible: only a number above 0 is"),
        (GPT_OSS, {"sliding_window": None}, "sliding_window=None is not supported: a number is"),
        (
            GPT_OSS,
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
            "quantization_config: weights quantised by 'mxfp4' are not read: make a .* dequantize --hf .* --output FOLDER",
        ),
        (GLM4_MOE, {"n_group": 2}, "topk_group=1 of n_group=2 with num_experts_per_tok=4 is not supported"),
        (GLM4_MOE, {"norm_topk_prob": None}, "norm_topk_prob=None is not supported: only True is"),
        (GLM4_MOE, {"first_k_dense_replace": None}, "first_k_dense_replace=None is not possible"),
        (GLM4_MOE, {"norm_topk_prob": False}, "norm_topk_prob=False is not supported: only True is"),
        (QWEN2, {"use_mrope": True}, "use_mrope=True is not supported: only False is"),
        (
            QWEN2,
            {"layer_types": ["full_attention", "chunked_attention"]},
            r"layer_types=\['full_attention', 'chunked_attention'\] is not supported: one of full_attention and",
        ),
        (LLAMA2, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported: only silu is"),
        (
            LLAMA2,
            {"rope_scaling": {"rope_type": "mrope"}},
            "rope type 'mrope' is not supported: use one of default, dyn",
        ),
        (LLAMA2, {"rope_scaling": {"type": "yarn"}, "rope_theta": 0}, "rope_theta=0 is not possible"),
        (LLAMA2, {"rope_scaling": [8]}, r"rope_scaling=\[8\] is not supported: only an object of parameters is"),
        (LLAMA2, {"rope_scaling": {"type": "linear"}}, "the rope scaling 'linear' lacks a number for 'factor'"),
        (LLAMA2, {"rope_scaling": {"type": "linear", "alpha": 2}}, "rope_scaling has the unknown parameters alpha=2"),
        (
            LLAMA2,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters has parameters of its own for full_attention, sliding_attention: only one RoPE",
        ),
        (
            LLAMA3,
            {"rope_scaling": LONGROPE | {"short_factor": [1.0]}},
            "short_factor has 1 numbers: one for each of 16",
        ),
        (
            LLAMA2,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is not supported: transformers' llama does not",
        ),
        (
            LLAMA2,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor=0.25 is not supported",
        ),
        (MISTRAL, {"attention_bias": True}, "the field attention_bias=True is not known"),
        (
            MISTRAL,
            {"layer_types": ["full_attention"] * 3},
            "with sliding_window=4096 computes sliding_attention in all layers",
        ),
        (
            MIXTRAL,
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "with sliding_window=None computes full_attention in all layers",
        ),
        (LLAMA2, {"activation": "gelu"}, "activation='gelu' is not supported: only swiglu is"),
        (LLAMA2, {"num_attention_heads": 0}, "num_attention_heads=0 is not possible: only a number above 0 is"),
        (LLAMA2, {"vocab_size": "320"}, "vocab_size='320' is not possible"),
        (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not supported where the weights"),
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not supported where the weights"),
        (
            LLAMA2,
            {"alibi": True, "use_sliding_window": True, "logit_scale": [0.5] * 60},
            r"use_sliding_window=True is not supported: only False is; the fields alibi=True, logit_scale=\[0.5, .*\.\.\. are "
            "not known and might change what the model computes: remove those that do not",
        ),
        (LLAMA2, {"query_pre_attn_scalar": 144}, "the field query_pre_attn_scalar=144 is not known"),
        (
            LLAMA2,
            {"quantization_config": {"bits": 4}},
            "quantization_config: weights quantised by 'unknown' are not read: name the folder of .*fp8 and mxfp4",
        ),
        (LLAMA2, {"qk_layernorm": True}, "the field qk_layernorm=True is not known"),
        (LLAMA2, {"logit_scale": 0.0625}, "the field logit_scale=0.0625 is not known"),
        (
            LLAMA2,
            {"model_type": "gemma2"},
            "model_type='gemma2' is not supported, for it caps attention scores by tanh: use one of .*llama, ",
        ),
        (LLAMA2, {"model_type": None}, "model_type=None is not supported"),
        (LLAMA2, {"vocab_size": None}, "vocab_size is missing"),
        (LLAMA2, {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        (LLAMA2, {"num_attention_heads": None}, "num_attention_heads is missing"),
        (LLAMA2, {"intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_unsupported_fields_are_named(folder, base, changes, message):
    path = folder(base | changes)
    with pytest.raises(ValueError, match=message) as error:
        read_architecture(path)
    assert str(error.value).startswith(f"{path}/config.json: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": False, "mlp_bias": None, "partial_rotary_factor": None},
        # SmolLM2, Falcon3, and what transformers 4.35 to 4.51 and generation leave behind.
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {"activation": "swiglu", "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True},
        {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "do_sample": True, "neftune_noise_alpha": 5.0},
        {"original_max_position_embeddings": 2048, "n_ctx": 4096, "unsloth_version": "2026.1", "hidden_act": "swish"},
        {"some_new_switch": False, "some_new_list": [], "some_new_number": 0, "some_new_name": None},
        {"attention_dropout": 0.1, "bos_token_id": 1, "eos_token_id": [2, 3]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {"layer_types": ["full_attention"] * 3},
    ],
    ids=str,
)
def test_harmless_fields_change_nothing(folder, changes):
    assert read_architecture(folder(LLAMA2 | changes, "changed")) == read_architecture(folder(LLAMA2))


def test_configurations_that_transformers_writes(tmp_path):
    for name, config in (("llama", LlamaConfig()), ("qwen2", Qwen2Config())):
        config.save_pretrained(tmp_path / name)
        a = read_architecture(str(tmp_path / name))
        assert (a.family, a.num_layers, a.vocabulary_size) == (
            name,
            config.num_hidden_layers,
            config.vocab_size,
        )


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist: name the folder of a Hugging Face checkpoint"):
        read_architecture(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "skipped"),
    [
        ({}, [0, 1, 0, 1, 0]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 4}, [0, 0, 0, 1, 0]),
        ({"no_rope_layers": [0, 1, 1, 0, 1]}, [1, 0, 0, 1, 0]),
        ({"no_rope_layers": [1, 1, 1, 1, 1, 0]}, [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_layers_without_rope_and_their_windows_are_those_of_transformers(folder, changes, skipped):
    windowed = {"use_sliding_window": True, "sliding_window": 64}
    path = folder(SMOLLM3 | changes)
    a, theirs = read_architecture(path), AutoConfig.from_pretrained(path)
    assert [1 - rope for rope in theirs.no_rope_layers[:5]] == skipped
    assert a.transformer_options == (("no_rope_freq", tuple(skipped)),)
    assert (a.sliding_window, a.windowed_layers) == (None, ())
    path = folder(SMOLLM3 | changes | windowed)
    a, theirs = read_architecture(path), AutoConfig.from_pretrained(path)
    kinds = [("full_attention", "sliding_attention")[one] for one in a.windowed_layers or (False,) * 5]
    assert kinds == theirs.layer_types


def test_sequences_end_where_queries_would_grow(folder):
    config = tiny_config("ministral3").to_dict()
    assert read_architecture(folder(config)).longest_sequence == 256 < config["max_position_embeddings"]
    config["rope_parameters"] |= {"llama_4_scaling_beta": 0.0}
    assert read_architecture(folder(config)).longest_sequence == config["max_position_embeddings"]


def test_a_family_is_registered_once():
    with pytest.raises(ValueError, match="the model family 'llama' is registered twice: remove one"):
        register(family_of("llama"))


def test_longrope_is_computed_within_the_original_length(folder):
    a = read_architecture(folder(LLAMA3 | {"rope_scaling": LONGROPE}))
    assert (a.max_positions, a.longest_sequence) == (131072, 4096)
    assert read_architecture(folder(LLAMA3)).longest_sequence == 131072
