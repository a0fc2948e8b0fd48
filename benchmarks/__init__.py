"""Benchmarks of the ops: ``bigkern bench``. One file an op, one harness, one CSV a machine and op."""
