"""Checkpoints: what a folder says of itself, saving and loading, where weights come from."""
