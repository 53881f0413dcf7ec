"""Helpers that several examples share, or that would make an example too long."""
