"""Triton kernels of the ops, one module each. They import Triton, so nothing imports them before it
has CUDA tensors to run them on.
"""
