"""Pages that each answer one question, and the scripts that make their figures."""
