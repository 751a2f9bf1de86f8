"""The networks, one file an architecture, and what can be watched while they run."""
