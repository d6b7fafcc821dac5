"""`text-generation-server quantize`: a checkpoint's matrices in fewer bits, layer by layer."""
