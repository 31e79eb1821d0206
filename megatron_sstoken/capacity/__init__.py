"""What a layout needs and what it gives, worked out from numbers alone: memory, communication, step time."""
