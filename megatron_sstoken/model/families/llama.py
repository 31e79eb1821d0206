"""Llama 2, 3, 3.1 and 3.2, and what shares their config."""

from megatron_sstoken.model.families.registry import ATTENTION_BIAS, MLP_BIAS, Family, register

register(
    Family(
        "llama",
        fixed={"use_sliding_window": False, "sliding_window": None},
        biases=ATTENTION_BIAS | MLP_BIAS,
        tiny={
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "tie_word_embeddings": False,
        },
    )
)
