"""Public benchmarks of reward models: their rules, the accuracy of variants by them, and the comparison of variants."""
