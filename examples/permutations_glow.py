"""Channels mixed between couplings by a reversal, a fixed shuffle or a learned 1x1 convolution, as in Glow's paper."""

import json

import torch
from common.image_models import image_parser, train
from matplotlib.figure import Figure

from pyroflows import UniformDequantizer, glow
from pyroflows.data import load_images
from pyroflows.plots import COLORS


def main() -> None:
    arguments = image_parser(__doc__, num_levels=3, hidden_channels=32, minutes=6.0, steps_per_epoch=50)
    arguments.add_argument("--data", dest="name", default="cifar10", choices=["cifar10", "mnist", "digits"])
    arguments.add_argument("--num-steps", type=int, default=4)
    arguments.add_argument("--coupling", default="additive", choices=["additive", "affine"])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    data = load_images(options.name, options.root, download=options.download)
    curves = {}
    for permutation in ("reverse", "shuffle", "conv"):
        torch.manual_seed(options.seed)
        flow = glow(
            data.shape,
            num_levels=options.num_levels,
            num_steps=options.num_steps,
            hidden_channels=options.hidden_channels,
            permutation=permutation,
            coupling=options.coupling,
            dequantizer=UniformDequantizer(data.shape, data.num_levels),
        )
        curves[permutation] = train(f"permutations_glow_{permutation}", flow, data, options)
        bits = curves[permutation]["test_bits_per_dim"]
        print(f"{permutation}: {bits:.4f} +- {curves[permutation]['standard_error']:.4f} bits/dim", flush=True)

    (options.output / "permutations_glow.json").write_text(json.dumps(curves, indent=1))
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.add_subplot()
    for (permutation, curve), color, style in zip(curves.items(), COLORS, ("-", "--", "-."), strict=False):
        steps = [options.steps_per_epoch * (epoch + 1) for epoch in range(len(curve["seconds"]))]
        label = {"conv": "1x1 convolution"}.get(permutation, permutation)
        ax.plot(steps, curve["validation_bits_per_dim"], style, color=color, label=label)
    lowest = min(min(curve["validation_bits_per_dim"]) for curve in curves.values())
    ax.set(xlabel="step", ylabel="validation bits/dim", ylim=(lowest - 0.05, lowest + 1.5))
    ax.set_title(f"Glow of {options.name}: mixing of channels ({options.coupling} couplings)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(options.output / "permutations_glow.png", dpi=110)
    gain = curves["reverse"]["test_bits_per_dim"] - curves["conv"]["test_bits_per_dim"]
    print(f"gain of 1x1 convolutions over a reversal: {gain:.4f} bits/dim")


if __name__ == "__main__":
    main()
