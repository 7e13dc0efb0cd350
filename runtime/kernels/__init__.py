"""Dequantization of GPTQ, NF4 and LLM.int8 weights: a plain torch reference, and fast versions of it."""
