"""PaliGemma: a picture and a prompt in, text out."""

__version__ = "0.1.0"
