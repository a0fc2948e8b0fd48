"""The same ops as `csrc/`, in Triton: one module an op, each with its kernels and their launchers.

Nothing here is imported until a Triton kernel is asked for.
"""
