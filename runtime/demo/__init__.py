"""The embedded demo model, built on first use, and its 4-bit variant."""
