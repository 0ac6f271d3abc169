"""nmoe against transformers on random DeepSeek-shaped models: relative errors of logits and of the worst gradient.

    python bench/parity.py [--configs 16]

The same comparison, with the same seeds, is a test: tests/test_hf.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from peer import compare, random_config, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=16)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, CPU; ‖ours − theirs‖ / ‖theirs‖"
    )
    print(f"{'':4}{'FP32':^18}{'float64':^18}")
    print(f"{'seed':4}{'logits':>9}{'gradient':>9}{'logits':>9}{'gradient':>9}  model")
    for seed in range(args.configs):
        config = random_config(seed)
        with tempfile.TemporaryDirectory() as folder:
            both = [compare(config, Path(folder) / kind, kind, seed) for kind in ("f32", "f64")]
        cells = "".join(f"{error:9.0e}" for parity in both for error in (parity.logits, parity.gradient))
        print(f"{seed:4}{cells}  {summary(config)}", flush=True)


if __name__ == "__main__":
    main()
