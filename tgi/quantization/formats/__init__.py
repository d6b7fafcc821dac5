"""How a checkpoint says that its weights are quantized, and the tensors that it has then. No torch."""
