"""Conversations in: the bundled set, users' own files, and the sample that calibrates and compares."""
