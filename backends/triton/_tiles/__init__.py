"""Tiles by operator, case and architecture, as JSON: read by _choice.py."""
