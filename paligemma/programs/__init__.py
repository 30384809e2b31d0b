"""The programs other than inference.py, and the code that all programs share: flags, help, errors, signals."""
