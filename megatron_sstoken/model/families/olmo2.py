"""OLMo 2: norms after attention and feed-forward part, none before, and one of q and k over all heads at once."""

from megatron_sstoken.model.families.architecture import LayerNorms
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Family, register

OLMO_NORMS = LayerNorms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)

register(
    Family(
        "olmo2",
        fixed={"sliding_window": None},
        biases=ATTENTION_BIAS,
        one_kind_of_layer=True,
        absent={"rms_norm_eps": 1e-5},
        qk_norm=True,
        norms=OLMO_NORMS,
        further=lambda config: {"qk_norm_over_heads": True},
        tiny={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    )
)
