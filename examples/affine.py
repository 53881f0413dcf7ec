"""Learn the mean and the scale of a normal by one elementwise affine layer, the smallest possible flow."""

import argparse

import torch

from pyroflows import ElementwiseAffine, Flow, StandardNormal, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer rows, for a rougher answer")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # with more, tensors this small are slower

    mean, scale = torch.tensor([3.0, -2.0]), torch.tensor([0.5, 4.0])
    x = mean + scale * torch.randn(10_000 if options.quick else 20_000, 2)
    flow = Flow(StandardNormal(2), ElementwiseAffine(2))
    result = fit(flow, x, epochs=10, learning_rate=0.05, validation=None, seed=options.seed)
    print(f"{result.steps} steps in {result.seconds:.1f} s")

    (layer,) = flow.layers
    learned_mean, learned_scale = layer.shift.detach(), layer.log_scale.detach().exp()
    for name, true, of_sample, learned in (
        ("mean", mean, x.mean(0), learned_mean),
        ("scale", scale, x.std(0), learned_scale),
    ):
        print(f"{name:>6}: true {true.tolist()}")
        for kind, value in (("of the sample", of_sample), ("learned", learned)):
            print(f"        {kind} {[round(number, 3) for number in value.tolist()]}")
    error = torch.cat([(learned_mean - x.mean(0)) / scale, learned_scale / x.std(0) - 1]).abs().max()
    print(f"largest error against the mean and scale of the sample, in scales: {error:.4f}")


if __name__ == "__main__":
    main()
