"""Triton kernels with their references and registrations. Knows tensors only."""
