"""Results of a quantization: final scores, head recalibration, parity report and model card."""
