"""Random bad input, for every reader of a file or a text."""
