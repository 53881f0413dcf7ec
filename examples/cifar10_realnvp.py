"""RealNVP of CIFAR-10, checkerboard and channel couplings: bits per dimension over time; the paper reports 3.49."""

import torch
from common.image_models import image_parser, train

from pyroflows import UniformDequantizer, realnvp
from pyroflows.data import load_images, random_flips


def main() -> None:
    arguments = image_parser(__doc__)
    arguments.add_argument("--num-blocks", type=int, default=8, help="residual blocks of each network")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    data = load_images("cifar10", options.root, download=options.download)
    torch.manual_seed(options.seed)
    flow = realnvp(
        data.shape,
        num_levels=options.num_levels,
        num_blocks=options.num_blocks,
        hidden_channels=options.hidden_channels,
        dequantizer=UniformDequantizer(data.shape, data.num_levels),
    )
    result = train("cifar10_realnvp", flow, data, options, augment=random_flips)
    print(f"test: {result['test_bits_per_dim']:.4f} +- {result['standard_error']:.4f} bits/dim")


if __name__ == "__main__":
    main()
