"""What an exported model says: loading it in transformers, generation, marking of answers. Knows nothing of megatron."""
