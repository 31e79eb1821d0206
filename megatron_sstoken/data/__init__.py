"""Data: conversations → tokens and roles → stores → rows and batches."""
