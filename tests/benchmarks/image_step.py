"""The time of Glow's training step, log_prob and sampling beside its peers' and the bare networks', in one run.

Glow of 3 levels of 4 steps for images of 3 x 32 x 32; the peers are built to the same sizes from their own parts.

The bare networks are the floor: each conditioner runs once, on a tensor of its input's shape; in training the loss is
the sum of what they give, and its gradient is taken of the inputs too, as a flow needs it. "networks, plain" are
convolutions without gains, so that the floor owes nothing to how pyroflows writes its own.

What the sizes differ in: pyroflows' and its networks' convolutions have a gain for each channel, folded into the
weights, which the peers' would pay for with passes over the hidden images, so theirs go without. The peers' log-scales
are those of the sigmoid, which they are built for. nflows has no learned mean and scale at the top, and its 1x1
convolutions have a bias; it keeps their matrices between evaluations (``using_cache``). FrEIA's matrices are rotations
that it does not learn, and what leaves at a level has a standard normal for its prior. The others form them anew.

``--compile`` adds pyroflows through ``torch.compile``, as ``fit(..., compile=True)`` trains.
After training, memory is already at hand; ``--operations log_prob sample`` times a process that only scores.
"""

import argparse
import json
import platform
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn
from vector_step import CLOCKS, hardware, synchronize

from pyroflows import Flow, glow
from pyroflows.layers import ConvCoupling

CHANNELS, SIDE, LEVELS, STEPS = 3, 32, 3, 4
OPERATIONS = ("train", "log_prob", "sample")


class Contestant(NamedTuple):
    """A module, its loss in training, and what it does without gradients."""

    module: nn.Module
    loss: Callable[[], Tensor]
    log_prob: Callable[[], object]
    sample: Callable[[], object]

    def operation(self, name: str) -> Callable[[], object]:
        self.module.train(name == "train")
        if name != "train":
            return torch.no_grad()(getattr(self, name))
        optimizer = torch.optim.Adam(self.module.parameters(), 1e-5, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

        return step


def our_glow(width: int) -> Flow:
    return glow((CHANNELS, SIDE, SIDE), num_levels=LEVELS, num_steps=STEPS, hidden_channels=width)


def pyroflows(data: Tensor, width: int) -> Contestant:
    flow = our_glow(width)
    return Contestant(
        flow, lambda: -flow.log_prob(data).mean(), lambda: flow.log_prob(data), lambda: flow.sample(len(data))
    )


def pyroflows_compiled(data: Tensor, width: int) -> Contestant:
    """The same through torch.compile, once a first batch has started the normalisations."""
    flow = our_glow(width)
    with torch.no_grad():
        flow.train().log_prob(data)
    log_prob, sample = torch.compile(flow.log_prob), torch.compile(flow.sample)
    return Contestant(flow, lambda: -log_prob(data).mean(), lambda: log_prob(data), lambda: sample(len(data)))


def networks(data: Tensor, width: int) -> Contestant:
    couplings = [part for part in our_glow(width).modules() if isinstance(part, ConvCoupling)]
    return alone([(part.conditioner, kept(part)) for part in couplings], len(data))


def networks_plain(data: Tensor, width: int) -> Contestant:
    couplings = [part for part in our_glow(width).modules() if isinstance(part, ConvCoupling)]
    made = (zero_conv if is_prior(part) else conv_net for part in couplings)
    return alone(
        [
            (make(part.sizes[0], 2 * part.sizes[1], width), kept(part))
            for make, part in zip(made, couplings, strict=True)
        ],
        len(data),
    )


def kept(coupling: ConvCoupling) -> tuple[int, ...]:
    return (coupling.sizes[0], *coupling.latent_shape[1:])


def is_prior(coupling: ConvCoupling) -> bool:
    return not hasattr(coupling.conditioner, "second")


def alone(parts: list[tuple[nn.Module, tuple[int, ...]]], batch: int) -> Contestant:
    """Run each network on an image of its own."""
    module = nn.ModuleList(network for network, _ in parts)
    images = [torch.randn(batch, *shape, requires_grad=True) for _, shape in parts]

    def run() -> list[Tensor]:
        return [network(image) for network, image in zip(module, images, strict=True)]

    def loss() -> Tensor:
        for image in images:
            image.grad = None
        return torch.stack([output.sum() for output in run()]).sum()

    return Contestant(module, loss, run, run)


def conv_net(inputs: int, outputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        zero_conv(width, outputs),
    )


def zero_conv(inputs: int, outputs: int, width: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def level_shapes() -> list[Size]:
    """Give the shape of each level's latent, the first nearest the data."""
    return [Size((CHANNELS * 2 ** (n + 2), SIDE // 2 ** (n + 1), SIDE // 2 ** (n + 1))) for n in range(LEVELS)]


def normflows(data: Tensor, width: int) -> Contestant:
    import normflows as nf

    bases, flows, merges = [], [], []
    for number, (channels, *pixels) in enumerate(level_shapes()):
        blocks = [nf.flows.GlowBlock(channels, width) for _ in range(STEPS)]
        last = number == LEVELS - 1
        if not last:
            merges.insert(0, nf.flows.Merge())
            blocks.insert(0, nf.flows.AffineCouplingBlock(zero_conv(channels // 2, channels), scale_map="sigmoid"))
        shape = (channels, *pixels) if last else (channels // 2, *pixels)
        bases.insert(0, nf.distributions.DiagGaussian(shape, trainable=last))
        flows.insert(0, [*blocks, nf.flows.Squeeze()])
    flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return Contestant(
        flow, lambda: flow.forward_kld(data), lambda: flow.log_prob(data, None), lambda: flow.sample(len(data))
    )


def nflows(data: Tensor, width: int) -> Contestant:
    from nflows import distributions, flows, transforms

    class Network(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return self.network(x)

    def coupling(channels: int, make: Callable[..., nn.Module]) -> nn.Module:
        moves = [1] * (channels // 2) + [0] * (channels // 2)
        return transforms.AffineCouplingTransform(moves, lambda i, o: Network(make(i, o, width)))

    multiscale = transforms.MultiscaleCompositeTransform(LEVELS)
    for number, shape in enumerate(level_shapes()):
        parts = [transforms.SqueezeTransform()]
        for _ in range(STEPS):
            mix = transforms.OneByOneConvolution(shape[0], using_cache=True)
            parts += [transforms.ActNorm(shape[0]), mix, coupling(shape[0], conv_net)]
        if number < LEVELS - 1:
            parts.append(coupling(shape[0], zero_conv))
        multiscale.add_transform(transforms.CompositeTransform(parts), shape)
    flow = flows.Flow(multiscale, distributions.StandardNormal([data[0].numel()]))
    return Contestant(
        flow, lambda: -flow.log_prob(data).mean(), lambda: flow.log_prob(data), lambda: flow.sample(len(data))
    )


def freia(data: Tensor, width: int) -> Contestant:
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    nodes = [framework.InputNode(*data.shape[1:])]

    def add(kind: type[nn.Module], inputs: object, **options: object) -> framework.Node:
        nodes.append(framework.Node(inputs, kind, options))
        return nodes[-1]

    out, left = nodes[0].out0, []
    for number in range(LEVELS):
        out = add(modules.IRevNetDownsampling, out).out0
        for _ in range(STEPS):
            networks = {"subnet_constructor": lambda i, o: conv_net(i, o, width)}
            out = add(modules.AllInOneBlock, out, permute_soft=True, **networks).out0
        if number < LEVELS - 1:
            halves = add(modules.Split, out)
            out = halves.out0
            left.append(add(modules.Flatten, halves.out1).out0)
    out = add(modules.Concat1d, [*left, add(modules.Flatten, out).out0]).out0
    flow = framework.GraphINN([*nodes, framework.OutputNode(out)])
    base = torch.distributions.Normal(0.0, 1.0)

    def log_prob() -> Tensor:
        z, log_det = flow(data)
        return base.log_prob(z).sum(-1) + log_det

    return Contestant(
        flow, lambda: -log_prob().mean(), log_prob, lambda: flow(torch.randn(len(data), data[0].numel()), rev=True)
    )


PEERS = {"normflows": normflows, "nflows": nflows, "FrEIA": freia}


def measure(steps: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time each once a round, the rounds in different orders, so that other work on the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-3, repeats):
        for name in random.sample(list(steps), len(steps)):
            began = clock()
            steps[name]()
            synchronize()
            if number >= 0:  # the first rounds start the normalisations and warm the caches
                seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Give the median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="such as cuda; the peers' tensors too")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--compile", action="store_true", help="time pyroflows through torch.compile too")
    parser.add_argument("--hidden-channels", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        default="wall",
        help="wall time, or the processor's time for this process, which a busy machine disturbs less (one thread)",
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for JSON and table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    clock = CLOCKS[options.clock]

    data = torch.randn(options.batch, CHANNELS, SIDE, SIDE)
    builders = {"pyroflows": pyroflows}
    builders |= {"pyroflows, compiled": pyroflows_compiled} if options.compile else {}
    builders |= {"networks": networks, "networks, plain": networks_plain}
    builders |= {name: PEERS[name] for name in options.peers}
    contestants = {name: build(data, options.hidden_channels) for name, build in builders.items()}
    with torch.no_grad():
        for contestant in contestants.values():
            contestant.module.train()
            contestant.log_prob()  # starts the normalisations

    results: dict[str, dict[str, dict[str, object]]] = {}
    for operation in options.operations:
        steps = {name: contestant.operation(operation) for name, contestant in contestants.items()}
        seconds = measure(steps, options.repeats, clock)
        results[operation] = {
            name: {
                "median_seconds": median(times),
                "quartiles": quantiles(times, n=4)[::2],
                "over_networks": ratio(seconds, name, "networks"),
                "over_plain_networks": ratio(seconds, name, "networks, plain"),
            }
            for name, times in seconds.items()
        }

    sizes = {name: sum(p.numel() for p in c.module.parameters()) for name, c in contestants.items()}
    lines = [
        "| | parameters | " + " | ".join(f"{operation} ms | x networks (plain)" for operation in results) + " |",
        "| --- |" + " ---: |" * (1 + 2 * len(results)),
    ]
    for name, size in sizes.items():
        cells = [
            f"{1e3 * row[name]['median_seconds']:.1f} | "
            f"{row[name]['over_networks']:.2f} ({row[name]['over_plain_networks']:.2f})"
            for row in results.values()
        ]
        lines.append(f"| {name} | {size:,} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "image_step.md").write_text("\n".join(lines) + "\n")
    (options.output / "image_step.json").write_text(
        json.dumps(
            {
                "setting": {key: str(value) if key == "output" else value for key, value in vars(options).items()},
                "versions": {name: version(name) for name in ("torch", "pyro-ppl", *options.peers)}
                | {"python": platform.python_version()},
                "machine": hardware(),
                "parameters": sizes,
                "results": results,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
