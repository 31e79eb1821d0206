"""What a layout needs and gives, estimated from numbers alone: memory, communication, step time."""
