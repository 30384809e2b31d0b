"""PaliGemma: a picture and a prompt in, text out."""
