"""Tests of what runs on a GPU only, on simulated GPUs: see pretend.py."""
