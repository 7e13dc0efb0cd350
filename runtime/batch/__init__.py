"""Score a file of rows: reader, engines (local or Ray), output files, resume."""
