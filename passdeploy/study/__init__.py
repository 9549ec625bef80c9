"""Studies: each asks one question, runs what answers it, and writes a page and its numbers."""
