"""Text Generation Inference, written anew in Python: a model id becomes an HTTP endpoint."""

__version__ = "0.1.0"
