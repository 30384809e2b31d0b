"""Code for GPUs only. A faster implementation is compared with a plain one before it is used: self_check.py."""
