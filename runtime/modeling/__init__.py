"""Qwen2 reward model in plain torch: packed batches, attention, linear layers, score head."""
