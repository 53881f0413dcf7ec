"""The time of flows of vectors beside Pyro, zuko, nflows, normflows, FrEIA and the bare networks, in one run.

Masked autoregressive flows, couplings and spline flows, each peer built to the same sizes from its own parts: the
parameters are counted and printed. All train with the same fused Adam. No flow mixes features by learned matrices or
normalises them, since not every peer has that.

The bare networks are the floor: each conditioner runs once, on a tensor of its input's shape; in training the loss is
the sum of what they give, and its gradient is taken of the inputs too, as a flow needs it. "networks" are those of
pyroflows, masked where a flow's are; "networks, plain" are linear maps and ReLUs without masks; "networks, plain Adam"
are the latter under torch's Adam with its default options.

``--growth`` times sampling of a MAF over numbers of rows and of features; ``--rule`` times the two ways to invert an
autoregressive layer, from which the constants of ``pyroflows/layers/inversion.py`` are set.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from pyroflows import Flow, maf, nsf, realnvp
from pyroflows.layers import inversion
from pyroflows.networks import MADE, MLP, MaskedLinear

BINS, BOUND = 8, 3.0
OPERATIONS = ("train", "log_prob", "sample")


class Case(NamedTuple):
    kind: str
    features: int
    num_layers: int
    hidden: tuple[int, ...]
    batch: int

    @property
    def autoregressive(self) -> bool:
        return self.kind in ("MAF", "NSF autoregressive")

    @property
    def num_parameters(self) -> int:
        return 3 * BINS - 1 if "NSF" in self.kind else 2

    def __str__(self) -> str:
        return f"{self.kind} D={self.features}, {self.num_layers} x {list(self.hidden)}, batch {self.batch}"


CASES = {
    "maf-8": Case("MAF", 8, 5, (128, 128), 512),
    "maf-64": Case("MAF", 64, 5, (512, 512), 256),
    "realnvp-8": Case("RealNVP", 8, 8, (128, 128), 512),
    "realnvp-64": Case("RealNVP", 64, 8, (128, 128), 512),
    "nsf-8": Case("NSF coupling", 8, 5, (128, 128), 512),
    "nsf-ar-8": Case("NSF autoregressive", 8, 5, (128, 128), 512),
}


class Contestant(NamedTuple):
    """A module, and what it does: score data, and draw a number of rows."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], object]
    fused: bool = True

    def operation(self, name: str, data: Tensor) -> Callable[[], object]:
        self.module.train(name == "train")
        if name == "log_prob":
            return torch.no_grad()(lambda: self.log_prob(data.clone()))  # Pyro's would find the very same tensor again
        if name == "sample":
            return torch.no_grad()(lambda: self.sample(len(data)))
        optimizer = torch.optim.Adam(self.module.parameters(), 1e-5, fused=True if self.fused else None)

        def step() -> None:
            optimizer.zero_grad()
            (-self.log_prob(data.clone()).mean()).backward()
            optimizer.step()

        return step


@torch.no_grad()
def our_flow(case: Case, noise: float = 0.03) -> Flow:
    """Give the flow as after training: an autoregressive layer's inversion depends on how much features say."""
    sizes: dict[str, Any] = {"num_layers": case.num_layers, "hidden_features": case.hidden, "residual": False}
    sizes |= {"norm": "none", "permutation": "reverse" if case.autoregressive else "none"}
    if case.kind == "MAF":
        flow = maf(case.features, **sizes)
    elif case.kind == "RealNVP":
        flow = realnvp(case.features, **sizes)
    else:
        flow = nsf(case.features, autoregressive=case.autoregressive, num_bins=BINS, bound=BOUND, **sizes)
    for parameter in flow.parameters():
        parameter.add_(noise * torch.randn_like(parameter))
    return flow


def pyroflows(case: Case) -> Contestant:
    flow = our_flow(case)
    return Contestant(flow, flow.log_prob, flow.sample)


def pyroflows_compiled(case: Case) -> Contestant:
    """The same through torch.compile, but for the sampling of a MAF, whose blocks it cannot see."""
    torch._dynamo.reset()  # or a flow of another case would count as one more shape of this
    flow = our_flow(case)
    sample = flow.sample if case.autoregressive else torch.compile(flow.sample)
    return Contestant(flow, torch.compile(flow.log_prob), sample)


def networks(case: Case) -> Contestant:
    return alone(case, [part for part in our_flow(case).modules() if isinstance(part, MADE | MLP) and outermost(part)])


def outermost(part: nn.Module) -> bool:
    return isinstance(part, MADE) or not any(isinstance(linear, MaskedLinear) for linear in part.linears)


def networks_plain(case: Case) -> Contestant:
    return alone(case, [mlp(*sizes_of(case)) for _ in range(case.num_layers)])


def networks_adam(case: Case) -> Contestant:
    return networks_plain(case)._replace(fused=False)


def sizes_of(case: Case) -> tuple[int, int, tuple[int, ...]]:
    moved = case.features if case.autoregressive else case.features // 2
    return moved, moved * case.num_parameters, case.hidden


def mlp(inputs: int, outputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for pair in pairwise((inputs, *hidden, outputs)):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def alone(case: Case, parts: list[nn.Module]) -> Contestant:
    """Run each network on a tensor of its own."""
    module = nn.ModuleList(parts)
    inputs = [torch.randn(case.batch, sizes_of(case)[0], requires_grad=True) for _ in parts]

    def total(_: Tensor) -> Tensor:
        for x in inputs:
            x.grad = None
        outputs = [part(x) for part, x in zip(parts, inputs, strict=True)]
        return torch.stack([output.sum() for output in outputs]).sum() if torch.is_grad_enabled() else outputs[0]

    return Contestant(module, total, total)


def pyro(case: Case) -> Contestant:
    from pyro.distributions import Normal, TransformedDistribution, transforms
    from pyro.nn import AutoRegressiveNN, DenseNN

    spline = {"count_bins": BINS, "bound": BOUND, "order": "quadratic"}
    width, half = case.features, case.features // 2
    each = [BINS, BINS, BINS - 1] if "NSF" in case.kind else [1, 1]
    transform: Any
    layers, module = [], nn.ModuleList()
    for number in range(case.num_layers):
        order = torch.arange(width) if number % 2 == 0 else torch.arange(width).flip(0)
        if case.autoregressive:
            network = AutoRegressiveNN(width, list(case.hidden), param_dims=each, permutation=order)
        else:
            network = DenseNN(half, list(case.hidden), param_dims=[half * size for size in each])
        if case.kind == "MAF":
            transform = transforms.AffineAutoregressive(network)
        elif case.kind == "RealNVP":
            transform = transforms.AffineCoupling(half, network)
        elif case.autoregressive:
            transform = transforms.SplineAutoregressive(width, network, **spline)
        else:
            transform = transforms.SplineCoupling(width, half, network, identity=True, **spline)
            del transform.lower_spline  # never used beside identity=True
        module.append(transform)
        layers.append(transform.inv if case.autoregressive else transform)
        if not case.autoregressive:
            layers.append(transforms.Permute(torch.arange(width).flip(0)))
    base = Normal(torch.zeros(width), 1.0).to_event(1)
    flow = TransformedDistribution(base, layers)
    return Contestant(module, flow.log_prob, lambda rows: flow.sample((rows,)))


def zuko(case: Case) -> Contestant:
    from functools import partial

    from zuko.distributions import DiagNormal
    from zuko.flows import MAF, NSF, Flow, GeneralCouplingTransform, RealNVP, UnconditionalDistribution
    from zuko.transforms import MonotonicRQSTransform

    sizes = {"transforms": case.num_layers, "hidden_features": case.hidden}
    if case.kind == "NSF coupling":
        numbers = torch.arange(case.features)
        layers = [
            GeneralCouplingTransform(
                case.features,
                mask=numbers % 2 == number % 2,
                univariate=partial(MonotonicRQSTransform, bound=BOUND),
                shapes=[(BINS,), (BINS,), (BINS - 1,)],
                hidden_features=case.hidden,
            )
            for number in range(case.num_layers)
        ]
        zeros = torch.zeros(case.features)
        flow = Flow(layers, UnconditionalDistribution(DiagNormal, zeros, zeros + 1, buffer=True))
    elif case.kind == "NSF autoregressive":
        flow = NSF(case.features, bins=BINS, **sizes)
    else:
        flow = {"MAF": MAF, "RealNVP": RealNVP}[case.kind](case.features, **sizes)
    return Contestant(flow, lambda x: flow().log_prob(x), lambda rows: flow().sample((rows,)))


class WithContext(nn.Module):
    """A network that is handed a context, which it ignores."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.network(x)


def made_options(case: Case) -> dict[str, Any]:
    """Two hidden layers, in the words of nflows and normflows: of one block, the first layer counting apart."""
    return {
        "features": case.features,
        "hidden_features": case.hidden[0],
        "num_blocks": len(case.hidden) - 1,
        "use_residual_blocks": False,
    }


def nflows(case: Case) -> Contestant:
    from nflows import distributions, flows, transforms

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    layers: list[nn.Module] = []
    for number in range(case.num_layers):
        moved = torch.tensor([i >= case.features // 2 for i in range(case.features)]) != bool(number % 2)
        coupling = {"mask": moved.int(), "transform_net_create_fn": lambda i, o: WithContext(mlp(i, o, case.hidden))}
        if case.kind == "MAF":
            layers.append(transforms.MaskedAffineAutoregressiveTransform(**made_options(case)))
        elif case.kind == "RealNVP":
            layers.append(transforms.AffineCouplingTransform(**coupling))
        elif case.autoregressive:
            made = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
            layers.append(made(**made_options(case), **spline))
        else:
            layers.append(transforms.PiecewiseRationalQuadraticCouplingTransform(**coupling, **spline))
        if case.autoregressive:
            layers.append(transforms.ReversePermutation(case.features))
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([case.features]))
    return Contestant(flow, flow.log_prob, flow.sample)


def normflows(case: Case) -> Contestant:
    import normflows as nf
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    layers: list[nn.Module] = []
    for number in range(case.num_layers):
        moved = torch.tensor([i >= case.features // 2 for i in range(case.features)]) != bool(number % 2)
        if case.kind == "MAF":
            layers.append(nf.flows.Reverse(nf.flows.MaskedAffineAutoregressive(**made_options(case))))
        elif case.kind == "RealNVP":
            layers.append(nf.flows.AffineCouplingBlock(mlp(*sizes_of(case))))
        elif case.autoregressive:
            made = MaskedPiecewiseRationalQuadraticAutoregressive(**made_options(case), **spline)
            layers.append(nf.flows.Reverse(made))
        else:
            make = {"transform_net_create_fn": lambda i, o: WithContext(mlp(i, o, case.hidden))}
            coupling = PiecewiseRationalQuadraticCoupling(moved.int(), **make, **spline)
            layers.append(nf.flows.Reverse(coupling))
        if case.autoregressive or case.kind == "RealNVP":
            layers.append(nf.flows.Permute(case.features, mode="swap"))
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(case.features, trainable=False), layers)
    return Contestant(flow, flow.log_prob, lambda rows: flow.sample(rows))


def freia(case: Case) -> Contestant | None:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock

    if case.kind != "RealNVP":
        return None
    flow = SequenceINN(case.features)
    for _ in range(case.num_layers // 2):  # each block moves both halves
        flow.append(
            GLOWCouplingBlock,
            subnet_constructor=lambda i, o: mlp(i, o, case.hidden),
            clamp_activation="TANH",
        )
    base = torch.distributions.Normal(0.0, 1.0)

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = flow(x)
        return base.log_prob(z).sum(-1) + log_det

    return Contestant(flow, log_prob, lambda rows: flow(torch.randn(rows, case.features), rev=True))


FLOORS = {"networks": networks, "networks, plain": networks_plain, "networks, plain Adam": networks_adam}
PEERS = {"Pyro": pyro, "zuko": zuko, "nflows": nflows, "normflows": normflows, "FrEIA": freia}
PACKAGES = {"Pyro": "pyro-ppl"}
COMPILED = "pyroflows, compiled"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def synchronize() -> None:
    """Wait for the GPU, if the tensors lie there."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.get_default_device()
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def measure(
    steps: dict[str, Callable[[], object]], repeats: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time each once a round, the rounds in different orders, so that other work on the machine meets all alike.

    As many rounds as asked for, or those that fit the seconds, but three.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    warm = 0
    for number in range(-3, repeats):
        spent = time.perf_counter() - start
        if (number < 0 and warm and spent > seconds / 10) or (number >= 3 and spent > seconds):
            if number >= 0:
                break
            continue
        for name in random.sample(list(steps), len(steps)):
            began = clock()
            steps[name]()
            synchronize()
            if number >= 0:
                times[name].append(clock() - began)
        warm += 1
    return times


def summary(times: dict[str, list[float]], bases: list[str]) -> dict[str, dict[str, Any]]:
    """Medians, and the medians over the rounds of the ratio within a round to each of the bases."""
    return {
        name: {
            "median_seconds": median(own),
            "quartiles": quantiles(own, n=4)[::2],
            "rounds": len(own),
            "over": {
                base: median(a / b for a, b in zip(own, times[base], strict=True)) for base in bases if base in times
            },
        }
        for name, own in times.items()
    }


def contestants_of(case: Case, peers: list[str], floors: bool = True, compiled: bool = False) -> dict[str, Contestant]:
    builders: dict[str, Callable[[Case], Contestant | None]] = {"pyroflows": pyroflows}
    if compiled:
        builders[COMPILED] = pyroflows_compiled
    builders |= (FLOORS if floors else {}) | {name: PEERS[name] for name in peers}
    made = {name: build(case) for name, build in builders.items()}
    return {name: contestant for name, contestant in made.items() if contestant is not None}


@torch.no_grad()
def round_trip(case: Case, dtype: torch.dtype) -> float:
    """The largest error, from data to latent and back, and from latent to data and back."""
    flow = our_flow(case).to(dtype)
    x = torch.randn(case.batch, case.features, dtype=dtype)
    there, back = flow.decode(flow.encode(x)) - x, flow.encode(flow.decode(x)) - x
    return max(float(there.abs().max()), float(back.abs().max()))


def compare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    data = torch.randn(case.batch, case.features)
    contestants = contestants_of(case, options.peers, compiled=options.compile)
    result: dict[str, Any] = {
        "parameters": {n: sum(p.numel() for p in c.module.parameters()) for n, c in contestants.items()},
        "round_trip": {str(dtype)[6:]: round_trip(case, dtype) for dtype in (torch.float32, torch.float64)},
    }
    for operation in options.operations:
        steps = {
            name: contestant.operation(operation, data)
            for name, contestant in contestants.items()
            if operation == "train" or name != "networks, plain Adam"
        }
        result[operation] = summary(
            measure(steps, options.repeats, options.seconds, options.clock), ["pyroflows", *FLOORS]
        )
    return result


def table(case: Case, result: dict[str, Any]) -> str:
    operations = [operation for operation in OPERATIONS if operation in result]
    lines = [
        f"**{case}**; round trip {result['round_trip']['float32']:.1e} in float32, "
        f"{result['round_trip']['float64']:.1e} in float64",
        "",
        "| | parameters | " + " | ".join(f"{name} ms | x pyroflows | x networks (plain)" for name in operations) + " |",
        "| --- |" + " ---: |" * (1 + 3 * len(operations)),
    ]
    for name, size in result["parameters"].items():
        cells = []
        for operation in operations:
            row = result[operation].get(name)
            if row is None:
                cells.append("| |")
                continue
            over = row["over"]
            cells.append(
                f"{1e3 * row['median_seconds']:.2f} | {over['pyroflows']:.2f} | "
                f"{over['networks']:.2f} ({over['networks, plain']:.2f})"
            )
        lines.append(f"| {name} | {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Time the sampling of a MAF over rows, and over features at one width."""
    settings = [(64, rows) for rows in (1, 256, 4096)] + [(features, 64) for features in (8, 64, 512)]
    peers = [name for name in options.peers if name != "FrEIA"]
    columns, results = ["log_prob", "pyroflows", *peers], {}
    lines = ["| MAF, 5 x [512, 512] | rows | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (1 + len(columns))]
    for features, rows in settings:
        case = Case("MAF", features, 5, (512, 512), rows)
        data = torch.randn(rows, features)
        # At 512 features a peer takes many seconds a draw: one stands for all.
        made = contestants_of(case, peers if features <= 64 else peers[:1], floors=False)
        steps = {name: contestant.operation("sample", data) for name, contestant in made.items()}
        steps["log_prob"] = made["pyroflows"].operation("log_prob", data)
        result = summary(measure(steps, options.repeats, options.seconds, options.clock), ["pyroflows", "log_prob"])
        results[f"D={features}, {rows} rows"] = result
        cells = [
            f"{1e3 * result[name]['median_seconds']:.1f} ms ({result[name]['over']['pyroflows']:.1f})"
            if name in result
            else ""
            for name in columns
        ]
        lines.append(f"| D={features} | {rows} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return results, "\n".join(lines)


def rule(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Time both ways to invert, over rows, features, widths and noise; and the first way over sizes of its blocks."""
    results: dict[str, Any] = {}
    lines = [
        "| D | hidden | noise | rows | passes | passes ms | in order ms, by block size: 32 | 64 | 128 | chosen ms |"
    ]
    lines.append("|" + " ---: |" * 9)
    grid = [
        *product((8, 64), (128, 512), (0.02, 0.05), (1, 4, 16, 64, 256)),
        *product((256,), (512,), (0.05,), (1, 16)),
    ]
    for features, width, noise, rows in grid:
        case = Case("MAF", features, 1, (width, width), rows)
        layer: Any = our_flow(case, noise).layers[0]
        made, x = layer.conditioner, torch.randn(rows, features)

        def invert(step: int, block: int, layer: Any = layer, x: Tensor = x) -> Callable[[], object]:
            def run() -> None:
                with mock.patch.multiple(inversion, _STEP=step, _BLOCK=block):
                    inversion.invert(layer.conditioner, layer.transformer, x, None)

            return run

        steps = {"passes": invert(10**15, 64)} | {str(block): invert(0, block) for block in (32, 64, 128)}
        steps["chosen"] = invert(inversion._STEP, inversion._BLOCK)
        with mock.patch.object(type(made), "forward", autospec=True, side_effect=type(made).forward) as forward:
            steps["passes"]()
        result = summary(measure(steps, options.repeats, options.seconds / 20, options.clock), ["64"])
        results[f"D={features}, hidden {width}, noise {noise}, {rows} rows"] = {"passes": forward.call_count} | result
        cells = [features, width, noise, rows, forward.call_count]
        cells += [f"{1e3 * row['median_seconds']:.2f}" for row in result.values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)
    return results, "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    names = [name for name in results if name in CASES]
    figure, axes = pyplot.subplots(1, len(OPERATIONS), figsize=(4.5 * len(OPERATIONS), 4), sharey=False, squeeze=False)
    for axis, operation in zip(axes[0], OPERATIONS, strict=True):
        for name in ("pyroflows", COMPILED, *PEERS):
            points = [
                (place, results[case][operation][name]["over"]["networks"])
                for place, case in enumerate(names)
                if name in results[case].get(operation, {})
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o", label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=operation, yscale="log", ylabel="time over the bare networks'")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each operation of a case, at least 3 rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="such as cuda; the peers' tensors too")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: beside other work, of one thread")
    parser.add_argument("--compile", action="store_true", help="pyroflows through torch.compile too (minutes)")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--growth", action="store_true", help="time sampling of a MAF over rows and features too")
    parser.add_argument("--rule", action="store_true", help="time both ways to invert an autoregressive layer too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for JSON, table and plot")
    options = parser.parse_args()
    setting = {key: str(value) if key == "output" else value for key, value in vars(options).items()}
    options.clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(options.seed)
    random.seed(options.seed)

    results, tables = {}, []
    for name in options.cases:
        results[name] = compare(CASES[name], options)
        tables.append(table(CASES[name], results[name]))
        print(tables[-1], end="\n\n", flush=True)
    for name, extra in (("growth", growth), ("rule", rule)):
        if getattr(options, name):
            results[name], text = extra(options)
            tables.append(text)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "vector_step.json"
    packages = ("torch", *(PACKAGES.get(name, name) for name in options.peers))
    record = {
        "setting": setting,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": hardware(),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    if options.cases:
        plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
