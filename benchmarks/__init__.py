"""Speed and memory, in turn with transformers."""
