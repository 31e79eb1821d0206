"""One pass of micro-batches through the pipeline schedule: losses, attention to the context, gradients."""
