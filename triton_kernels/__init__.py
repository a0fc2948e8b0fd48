"""The same ops as `csrc/`, in Triton: a package each, with its kernels and their launchers.

Nothing here is imported until a Triton kernel is asked for.
"""
