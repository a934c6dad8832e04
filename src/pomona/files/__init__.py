"""Files: `.pomona.safetensors` and plain safetensors; sparse and quantized tensors. Nothing here imports torch."""
