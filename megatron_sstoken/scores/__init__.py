"""Signals that tokens are scored by; tensors only, nothing of megatron."""
