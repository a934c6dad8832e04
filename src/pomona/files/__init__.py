"""Files: the container, safetensors, sparse and quantized tensors. Nothing here imports torch."""
