"""Triton kernels with their references and registrations. Knows tensors only.

Every operation is registered in the namespace `fxresu`; CUDA tensors run the Triton kernel, CPU tensors the reference.

| file          | functions                                                                     |
|---------------|-------------------------------------------------------------------------------|
| bits.py       | words, pack, unpack, unpack_aten, count, row_counts: one mask bit per weight  |
| layout.py     | row_starts, coordinates: where compact entries belong                         |
| phi.py        | gather (Phi^T), gather_add_, scatter (Phi), scatter_, pack_active; kernels in phi_kernels.py |
| compose.py    | compose (M o W + Phi(theta) with cast), packed_linear                         |
| decode_linear.py | decode_linear: the linear of few tokens that decodes packed storage; kernels in decode_kernels.py |
| choose.py     | the chooser: candidates of an operation, measured once for a shape and device |
| quantized.py  | compose_quantized: active values in 8 or 4 bits                               |
| mm_few.py     | mm_few: the product of few tokens, at the speed of reading the weight         |
| linear_few.py | candidates of a linear: few_tokens, grad_gather, grad_masked                  |
| semi_structured.py | compress_24, compress_24_both, mm_24: 2:4 products; candidate cusparselt    |
| sparse_order.py | 2:4 weights in the order of Hopper's sparse tensor cores                      |
| grad_weight.py | grad_gather, grad_masked: the gradient of few tokens, only where wanted        |
| theta_rules.py | Rule, ThetaOperands: the updates of theta and their reference                |
| theta_step.py | theta_step_, theta_steps_: the updates, written to the weight, of one or many |
| theta_launch.py | which kernels take them: theta_rows.py, selective_rows.py, theta_kernels.py, selective_kernels.py |
| blockwise8.py | moments in 8 bits                                                             |
| adamw_rule.py | AdamW, AdamWOperands: the update of a whole weight and its reference          |
| adamw_checks.py | what an update of a whole weight refuses                                    |
| adamw_step.py | adamw_step_: that update, with stochastic rounding, in one pass               |
| adamw_steps.py | adamw_steps_: of many weights in one launch                                  |
| factored_moments.py | factored_moments_: the second moment of matrices as a row and a column vector |
| factored_root.py | what an update reads of it                                                  |
| running_clip.py | running_clip: the clipping factor while gradients are still coming         |
| philox.py     | random bits from a seed and a counter; rounding to bfloat16                   |
| select.py     | kth_largest: exact threshold without a sort                                   |
| active_sums.py | active_sums: counts and sums of active values by rows                        |
| head_loss.py  | head_loss: cross-entropy of a frozen head and its gradient; slope_rows_, scale_ |
| slope_tile.py | slope_tile_: the slope of a cross-entropy over a tile of the vocabulary      |
| log8.py       | encode, decode: tensors that wait in 8-bit logarithmic codes                  |
| transfers.py  | restore_begin, restore_end: transfers as operations of a graph                |
| commit.py     | commit_, apply_mask_, transition_counts: change of mask                       |
| fp8.py        | linear_fp8: products in e4m3 for phases without a backward                    |
| read_number.py | read_number: a number from the device, past copies that are under way |
| host_copies.py | to_host, from_host, arrive: tensors that wait in pinned host memory          |
| _salt.py      | kernel_salt: fingerprint of this package for compile caches                   |
"""

from ._salt import kernel_salt
from .active_sums import active_sums
from .adamw_rule import AdamW, AdamWOperands
from .adamw_step import adamw_step_
from .adamw_steps import adamw_steps_
from .bits import count, pack, row_counts, unpack, unpack_aten, words
from .commit import apply_mask_, commit_, transition_counts
from .compose import compose, packed_linear
from .decode_linear import decode_linear
from .factored_moments import factored_moments_
from .grad_weight import grad_gather, grad_masked
from .head_loss import head_loss, slope_rows_
from .layout import coordinates, row_starts
from .mm_few import mm_few
from .phi import gather, gather_add_, pack_active, scatter, scatter_
from .quantized import compose_quantized
from .read_number import read_number
from .row_select import row_select, row_share
from .running_clip import running_clip
from .select import kth_largest
from .semi_structured import compress_24, compress_24_both, mm_24
from .slope_tile import slope_tile_
from .theta_launch import forget_addresses
from .theta_rules import Rule, ThetaOperands
from .theta_step import theta_step_, theta_steps_

__all__ = [
    "AdamW",
    "AdamWOperands",
    "Rule",
    "ThetaOperands",
    "active_sums",
    "adamw_step_",
    "adamw_steps_",
    "apply_mask_",
    "commit_",
    "compose",
    "compress_24",
    "compress_24_both",
    "compose_quantized",
    "coordinates",
    "count",
    "decode_linear",
    "factored_moments_",
    "forget_addresses",
    "gather",
    "gather_add_",
    "grad_gather",
    "grad_masked",
    "head_loss",
    "slope_rows_",
    "slope_tile_",
    "kernel_salt",
    "kth_largest",
    "mm_24",
    "mm_few",
    "pack",
    "pack_active",
    "packed_linear",
    "read_number",
    "row_counts",
    "row_select",
    "row_share",
    "row_starts",
    "running_clip",
    "scatter",
    "scatter_",
    "theta_step_",
    "theta_steps_",
    "transition_counts",
    "unpack",
    "unpack_aten",
    "words",
]
