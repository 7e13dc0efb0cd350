"""Read, quantize and write the blocks one after another."""
