"""The independent judge: ssToken from its definitions, on Hugging Face models, one sample at a time."""
