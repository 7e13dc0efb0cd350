"""The HTTP API: the kit's own endpoints, and those that trainers already speak."""
