"""Run a model on its devices: memory estimate, placement, loading, pipeline, streaming."""
