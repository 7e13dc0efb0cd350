"""Quantize 16-bit reward models block by block and write packed checkpoints with a parity report."""
