"""Score conversations with WorldPM reward models, 16-bit or quantized."""
