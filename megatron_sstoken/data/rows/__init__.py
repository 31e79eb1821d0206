"""Rows of whatever form → conversations."""
