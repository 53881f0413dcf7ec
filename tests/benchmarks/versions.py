"""The time of steps of named flows in two checkouts of this repository, by alternating calls.

python tests/benchmarks/versions.py OLD NEW

A process of each checkout holds its flows and runs one call at a time, in turn, so that what else the machine does
disturbs both alike. Printed are the ratios NEW / OLD of processor time: of the medians, and the median of the ratios of
neighbouring calls.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

OPERATIONS = ("train", "log_prob", "sample")
SIZES = {
    "maf-8": ("maf", 8, {"num_layers": 5, "hidden_features": (128, 128)}),
    "maf-64": ("maf", 64, {"num_layers": 5, "hidden_features": (256, 256)}),
    "realnvp-8": ("realnvp", 8, {"num_layers": 8, "hidden_features": (128, 128)}),
    "realnvp-64": ("realnvp", 64, {"num_layers": 8, "hidden_features": (256, 256)}),
    "nsf-8": ("nsf", 8, {"num_layers": 4, "hidden_features": (128, 128)}),
    "nsf-ar-8": ("nsf", 8, {"num_layers": 4, "hidden_features": (128, 128), "autoregressive": True}),
    "glow": ("glow", (3, 16, 16), {"hidden_channels": 64}),
}


def serve() -> None:
    """Run one call for each line of the standard input, and print its processor time."""
    import torch

    import pyroflows

    torch.set_num_threads(1)
    torch.manual_seed(0)
    flows = {name: getattr(pyroflows, builder)(size, **options) for name, (builder, size, options) in SIZES.items()}
    data = {name: torch.randn(16 if name == "glow" else 512, *flow.event_shape) for name, flow in flows.items()}
    optimizers = {name: torch.optim.Adam(flow.parameters(), 1e-4, fused=True) for name, flow in flows.items()}
    print(pyroflows.__file__, flush=True)
    for line in sys.stdin:
        name, operation = line.split()
        flow, x, optimizer = flows[name], data[name], optimizers[name]
        flow.train(operation == "train")
        began = time.process_time()
        if operation == "train":
            optimizer.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimizer.step()
        else:
            with torch.no_grad():
                flow.log_prob(x) if operation == "log_prob" else flow.sample(len(x))
        print(time.process_time() - began, flush=True)


class Server:
    """The process of a checkout."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        print(self.process.stdout.readline().strip())

    def seconds(self, name: str, operation: str) -> float:
        self.process.stdin.write(f"{name} {operation}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", type=Path, nargs="*", help="the old one and the new one")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cases", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    if len(options.checkouts) != 2:
        parser.error(f"expected two checkouts; got {len(options.checkouts)}")
    old, new = (Server(folder) for folder in options.checkouts)
    print("| case | operation | old, ms | medians | pairs |\n| --- | --- | ---: | ---: | ---: |")
    for name in options.cases:
        for operation in OPERATIONS:
            pairs = []
            for index in range(options.rounds + 3):
                order = (old, new) if index % 2 else (new, old)
                times = {server: server.seconds(name, operation) for server in order}
                pairs.append((times[old], times[new]))
            before, after = zip(*pairs[3:], strict=True)
            of_pairs = median(b / a for a, b in pairs[3:])
            ratio = median(after) / median(before)
            print(f"| {name} | {operation} | {1e3 * median(before):.2f} | {ratio:.3f} | {of_pairs:.3f} |", flush=True)


if __name__ == "__main__":
    main()
