"""Conversations → text by a chat template → tokens, roles and weights."""
