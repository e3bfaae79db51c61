"""Train the byte-level model of the quality evidence on one GPU, in one command or in several that hand their state on.

    python benchmarks/quality/train.py --out OUT --minutes 8.5 --part 1/2
    python benchmarks/quality/train.py --out OUT2 --minutes 8.5 --part 2/2 --resume OUT

TRAINING.md has the recipe. `--smoke` trains a tiny model on the CPU.
"""

import time

STARTED = time.monotonic()

if __name__ == "__main__":  # the workers that make data load this file too, and must not load PyTorch
    from training import run

    run.main(__doc__, STARTED)
