"""A fingerprint of the kernels' source text, for compile-cache keys."""

import functools
import hashlib
from pathlib import Path


@functools.cache
def kernel_salt() -> str:
    """SHA-256 (hex) of the names and texts of all Python files of this package.

    AOTAutograd's cache does not see the backward formula of a custom operation: a changed formula would still hit the
    old entry. A key that carries this fingerprint misses instead.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()
