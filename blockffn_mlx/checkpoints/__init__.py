"""Models on disk: reading, naming, converting, writing."""
