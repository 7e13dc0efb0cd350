"""Compare a variant's scores with reference scores: metrics, breakdowns, parity report."""
