"""Gradients of the scores by the outputs of all linears, computed before the first block is quantized."""
