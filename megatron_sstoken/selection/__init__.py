"""Which tokens are trained on; tensors and process groups only, nothing of megatron."""
