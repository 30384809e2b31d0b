"""Fine-tuning: examples, loss and updates, scores, and the folder of a run."""
