"""Thirteen posteriors of posteriordb by the same call of fit_posterior, against their reference draws."""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from common.posteriordb_models import MODELS, load_posterior

from pyroflows import fit_posterior, moment_table, sliced_wasserstein

HEAD = f"{'posterior':<32}{'seed':>5}{'s':>7}{'ELBO':>10}{'ESS/N':>7}{'k-hat':>12}{'mean':>7}{'sd':>6}{'W1/floor':>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds posteriordb/; by default PYROFLOWS_DATA")
    parser.add_argument("--output", type=Path, default=Path("posteriordb.json"))
    parser.add_argument("--names", nargs="*", default=list(MODELS), help="posteriors; by default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(HEAD, flush=True)
    rows = []
    for name in options.names:
        case = load_posterior(name, options.data)
        halves = case.reference.view(10, -1, len(case.names))  # by chain
        floor = sliced_wasserstein(halves[::2].flatten(0, 1), halves[1::2].flatten(0, 1))
        for seed in range(options.seeds):
            began = time.perf_counter()
            posterior = fit_posterior(
                case.model, **case.data, seed=seed, max_steps=20 if options.quick else 3500, progress=False
            )
            seconds = time.perf_counter() - began
            torch.manual_seed(seed)
            draws = case.to_reference(posterior.draws(5000))
            moments = moment_table(draws, case.reference, case.names)
            row = {
                "name": name,
                "seed": seed,
                "seconds": seconds,
                "steps": sum(result.steps for result in posterior.results),
                "elbo": posterior.elbo,
                "elbo_error": posterior.elbo_error,
                "log_evidence": posterior.log_evidence,
                "ess_ratio": posterior.weights.ess_ratio,
                "khat": posterior.khat,
                "mean_error": moments.worst_mean_error,
                "sd_error": moments.worst_sd_error,
                "w1": sliced_wasserstein(draws, case.reference) / floor,
                "verdict": posterior.verdict,
                "reason": posterior.reason,
            }
            rows.append(row)
            khat = f"{min(row['khat']):.2f} to {max(row['khat']):.2f}"
            print(
                f"{name.split('-')[-1]:<32}{seed:>5}{seconds:>7.1f}{row['elbo']:>10.2f}{row['ess_ratio']:>7.3f}{khat:>13}"
                f"{row['mean_error']:>6.3f}{row['sd_error']:>6.3f}{row['w1']:>10.2f}  {posterior.verdict}",
                flush=True,
            )
            options.output.write_text(json.dumps(rows, indent=1))
    within = [row for row in rows if row["mean_error"] < 0.1 and row["sd_error"] < 0.1]
    trusted = [row for row in rows if row["verdict"] == "trust"]
    print(f"within 0.1 sd and 10 %: {len(within)} of {len(rows)}; trusted {len(trusted)}", end=", ")
    print(f"of those, off by 0.2 sd or 20 %: {sum(max(row['mean_error'], row['sd_error']) > 0.2 for row in trusted)}")
    print(
        f"median W1/floor {median(row['w1'] for row in rows):.2f}, seconds {median(row['seconds'] for row in rows):.0f}"
    )


if __name__ == "__main__":
    main()
