"""Many chains at once on posteriors of 60 to 200 latents: processor seconds, evidence and what the chains show.

python tests/benchmarks/chains.py --seeds 2
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from common.large_posteriors import MODELS, simulate

from pyroflows.inference.chains import run_ensemble, scale_of_prior
from pyroflows.inference.log_joint import LogJoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| posterior | latents | seed | s | log evidence | nested R-hat | ESS | drift | BFMI | converged |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in options.names:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            began = time.process_time()
            log_joint = LogJoint(MODELS[name], (), simulate(name))
            found = run_ensemble(log_joint, scale_of_prior(log_joint))
            seconds = time.process_time() - began
            print(
                f"| {name} | {log_joint.dim} | {seed} | {seconds:.0f} | {found.log_evidence:.2f} +- "
                f"{found.log_evidence_error:.2f} | {found.rhat:.3f} | {found.ess:.0f} | {found.drift:.3f} | "
                f"{found.bfmi:.2f} | {found.has_converged} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
