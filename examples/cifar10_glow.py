"""Glow of CIFAR-10 at three scales: bits per dimension over time, and samples; the paper's larger one reaches 3.35."""

import torch
from common.image_models import image_parser, train

from pyroflows import UniformDequantizer, glow
from pyroflows.data import load_images, random_flips


def main() -> None:
    arguments = image_parser(__doc__, num_levels=3, hidden_channels=512)
    arguments.add_argument("--num-steps", type=int, default=16)
    arguments.add_argument("--bits", type=int, default=8, help="bits of each pixel, from 2 to 8")
    arguments.add_argument("--classes", action="store_true", help="condition on the class")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    data = load_images("cifar10", options.root, bits=options.bits, download=options.download)
    torch.manual_seed(options.seed)
    flow = glow(
        data.shape,
        num_levels=options.num_levels,
        num_steps=options.num_steps,
        hidden_channels=options.hidden_channels,
        num_classes=data.num_classes if options.classes else 0,
        dequantizer=UniformDequantizer(data.shape, data.num_levels),
    )
    result = train("cifar10_glow", flow, data, options, augment=random_flips)
    print(f"test: {result['test_bits_per_dim']:.4f} +- {result['standard_error']:.4f} bits/dim")


if __name__ == "__main__":
    main()
