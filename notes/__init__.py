"""Pages that each answer one question, and the scripts that draw their figures."""
