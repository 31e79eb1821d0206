"""Does token selection help? Arms, seeds and known noise on a real pretrained model: `python -m benchmarks.evidence`."""
