"""Between Hugging Face folders and megatron-core checkpoints."""
