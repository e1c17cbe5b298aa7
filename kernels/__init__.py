"""Triton kernels with their references and registrations. Knows tensors only.

Every operation is registered in the namespace `fxresu`; CUDA tensors run the Triton kernel, CPU tensors the reference.

| file          | functions                                                                     |
|---------------|-------------------------------------------------------------------------------|
| bits.py       | words, pack, unpack, unpack_aten, count, row_counts: one mask bit per weight  |
| layout.py     | row_starts, coordinates: where compact entries belong                         |
| phi.py        | gather (Phi^T), gather_add_, scatter (Phi), scatter_, pack_active             |
| compose.py    | compose (M o W + Phi(theta) with cast), packed_linear                         |
| theta_step.py | theta_step_: selective, sgd, momentum and adam updates, written to the weight |
| select.py     | kth_largest: exact threshold without a sort                                   |
| commit.py     | commit_, apply_mask_, transition_counts: change of mask                       |
| _salt.py      | kernel_salt: fingerprint of this package for compile caches                   |
"""

from ._salt import kernel_salt
from .bits import count, pack, row_counts, unpack, unpack_aten, words
from .commit import apply_mask_, commit_, transition_counts
from .compose import compose, packed_linear
from .layout import coordinates, row_starts
from .phi import gather, gather_add_, pack_active, scatter, scatter_
from .select import kth_largest
from .theta_step import theta_step_

__all__ = [
    "apply_mask_",
    "commit_",
    "compose",
    "coordinates",
    "count",
    "gather",
    "gather_add_",
    "kernel_salt",
    "kth_largest",
    "pack",
    "pack_active",
    "packed_linear",
    "row_counts",
    "row_starts",
    "scatter",
    "scatter_",
    "theta_step_",
    "transition_counts",
    "unpack",
    "unpack_aten",
    "words",
]
