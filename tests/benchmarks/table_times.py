"""Processor seconds and memory of FlowDensity().fit on simulated tables, one thread.

python tests/benchmarks/table_times.py
"""

import resource
import time

import numpy as np
import torch

from pyroflows import FlowDensity


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    mixing, z = rng.normal(size=(20, 20)), rng.normal(size=(1000, 20))
    structured = np.where(
        rng.random((1000, 1)) < 0.5, 3 * np.tanh(z @ mixing) + 0.3 * z, 0.3 * np.exp(z / 2) @ mixing.T
    )
    long = rng.normal(size=(1_000_000, 3))
    long[:, 2] = np.sin(2 * long[:, 0]) + 0.3 * long[:, 2]
    print("| table | s | GiB |\n| --- | ---: | ---: |")
    for name, x in (("normal", rng.normal(size=(1000, 10))), ("structured", structured), ("long", long)):
        began = time.process_time()
        FlowDensity(random_state=0).fit(x)
        seconds, memory = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {name}, {len(x):,} x {x.shape[1]} | {seconds:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
