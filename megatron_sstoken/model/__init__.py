"""From a Hugging Face configuration to a trainable megatron-core model, and its parts."""
