"""The GPTQ solver, and quantization methods without calibration data."""
