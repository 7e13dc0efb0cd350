"""Shared by all packages: errors, atomic files, terminal output, command entry points."""
