"""Find, open and check checkpoints: config, safetensors headers, expected tensors. Never runs their code."""
