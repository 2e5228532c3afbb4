"""The CUDA engine: a network lowered to fused steps over one arena, each step run by the fastest
correct kernel, and the whole of detection captured as one CUDA graph.
"""
