"""A quantization job: inputs, recipe, plan, resource checks, state on disk and progress line."""
