"""Block-scaled number formats: what they are, and how values go in and out. Knows nothing of models."""
