"""Conversations and preference pairs: row files, chat rendering, policy transcripts."""
