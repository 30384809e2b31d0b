"""What runs on GPUs only, and is compared with the plain way before it is used."""
