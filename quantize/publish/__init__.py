"""Publish a quantized checkpoint on the Hugging Face hub."""
