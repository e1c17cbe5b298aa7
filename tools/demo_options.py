"""The demo: `fxresu train` with options that fit the machine. Whatever is given on the command line wins."""

import sys

import torch

from fxresu.cli import main

CPU = ["--layers=4", "--width=128", "--heads=4", "--batch=8", "--seq=128", "--vocab=1024", "--steps-per-cycle=600"]
GPU = ["--batch=32", "--seq=512", "--steps-per-cycle=400", "--autocast=bf16"]
COMMON = [
    "--out=runs/demo", "--cycles=2", "--split", "0.5", "0.1", "0.4", "--sparsity-start=0.5", "--sparsity-end=0.7",
    "--rule=adam", "--train-rest", "--lr=2e-3",
]  # fmt: skip

if __name__ == "__main__":
    options = GPU if torch.cuda.is_available() else CPU
    sys.exit(main(["train", *COMMON, *options, *sys.argv[1:]]))
