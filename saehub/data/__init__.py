"""Models, text sources and packed tokens."""
