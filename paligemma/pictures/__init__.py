"""Loads pictures safely from files, the web and memory, and lists folders of a million pictures."""
