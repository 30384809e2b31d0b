"""Tests of what runs on a GPU only, on pretended GPUs: see pretend.py."""
