"""Turn a 16-bit reward model into a packed one, in one read of its blocks."""
