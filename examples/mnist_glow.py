"""Glow of MNIST: bits per dimension over time, and samples; the literature reports 1.05 for Glow."""

import torch
from common.image_models import image_parser, train

from pyroflows import UniformDequantizer, glow
from pyroflows.data import load_images


def main() -> None:
    arguments = image_parser(__doc__, learning_rate=3e-3)
    arguments.add_argument("--num-steps", type=int, default=8)
    arguments.add_argument("--fashion", action="store_true", help="Fashion-MNIST instead")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    name = "fashion_mnist" if options.fashion else "mnist"
    data = load_images(name, options.root, download=options.download)
    torch.manual_seed(options.seed)
    flow = glow(
        data.shape,
        num_levels=options.num_levels,
        num_steps=options.num_steps,
        hidden_channels=options.hidden_channels,
        alpha=1e-5,  # most pixels are black, and a small alpha spreads their narrow interval
        dequantizer=UniformDequantizer(data.shape, data.num_levels),
    )
    result = train(f"{name}_glow", flow, data, options)
    print(f"test: {result['test_bits_per_dim']:.4f} +- {result['standard_error']:.4f} bits/dim")


if __name__ == "__main__":
    main()
