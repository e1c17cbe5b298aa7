"""fxresu: compiled graph transforms for phase-aware sparse training in PyTorch."""

__version__ = "0.1.0"
