"""Faster or smaller layers for the model: LoRA, int8 and int4 weights, C++ kernels, CUDA graphs."""
