"""The device island: turns a plan into a batch, runs the model over the paged KV cache and samples."""
