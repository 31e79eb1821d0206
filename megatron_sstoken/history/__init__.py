"""Where history losses come from."""
