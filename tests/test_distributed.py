"""A fit on two processes is that on one, and one that was killed goes on; this file is also what the processes run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import fit
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyroflows import AutoFlow, DistributedELBO, distributed, fit_posterior, glow, maf, realnvp
from pyroflows.data import ParquetBatches
from pyroflows.dequantizers import UniformDequantizer
from pyroflows.inference.guide_fit import GuideFit
from pyroflows.inference.posterior import require_log_joint
from pyroflows.inference.watch import Watch
from pyroflows.training import negative_log_likelihood
from pyroflows.training.batches import MappedArray

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
# The optimizer divides a gradient by its own size: one that is zero but for rounding, as that of a shift in front of a
# norm, would move a weight by rounding alone. The decay gives every weight a gradient of its own.
OPTIONS = {"batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.1, "seed": 0, "device": "cpu"}
FIFTY = {"epochs": 5, "steps_per_epoch": 10, **OPTIONS}


def table(rows=300):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([2 * x[:, 0] + 1, x[:, 1] + x[:, 0] ** 2, x[:, 2].exp()], 1)


def pictures(rows=100):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 8, (rows, 1, 8, 8), generator=generator)
    return steps.cumsum(-1) / 64 + torch.rand(rows, 1, 8, 8, generator=generator)


def moved(flow, dtype):
    """Give the flow weights of which none is zero."""
    flow, generator = flow.to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return flow


def small(norm="actnorm", dtype=torch.float64, features=3, **options):
    torch.manual_seed(0)
    return moved(maf(features, num_layers=2, hidden_features=(8,), norm=norm, **options), dtype)


def result_of(flow, result):
    history = {name: values for name, values in result.history.items() if name != "seconds"}
    return {"state": flow.state_dict(), "history": history, "steps": result.steps, "stopped": result.stopped}


# What one process and two come to, case by case


def fifty_steps(kind, dtype, **options):
    if kind == "glow":
        torch.manual_seed(0)
        flow = moved(glow((1, 8, 8), num_levels=2, num_steps=1, hidden_channels=8), dtype)
        return result_of(flow, fit(flow, pictures().to(dtype), **FIFTY, **options))
    flow = small(kind, dtype)
    return result_of(flow, fit(flow, table().to(dtype), **FIFTY))


def likelihood(y, subsample_size=None):
    mean, scale = pyro.sample("mean", dist.Normal(0.0, 2.0)), pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y), subsample_size=subsample_size) as rows:
        pyro.sample("y", dist.StudentT(3.0, mean, scale), obs=y[rows])


def observations(dtype):
    return (2 * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1).to(dtype)


def guide(dtype):
    """Train as ``fit_posterior`` does, by the total and then by the path gradient."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        guide = AutoFlow(likelihood, init="none", args=(observations(dtype),))
        moved(guide.flow, dtype)
        training = GuideFit(guide, require_log_joint(guide), 64, Watch(None, False))
        options = {"epochs": 5, "steps_per_epoch": 5, **OPTIONS, "batch_size": None}
        for objective in (training.total, training.path):
            fit(guide.flow, objective=objective, **options)
        return {"state": guide.flow.state_dict()}
    finally:
        torch.set_default_dtype(before)


def subsampled():
    """Rows of a plate are drawn by each process; a guide without draws of its own shows that they are those of one."""
    y, own = observations(torch.float64), 20 // processes()
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = AutoDelta(likelihood)
    guide(y, own)
    torch.manual_seed(0)
    svi = SVI(likelihood, guide, pyro.optim.Adam({"lr": 0.01}), DistributedELBO(Trace_ELBO()))
    losses = [svi.step(y, own) for _ in range(50)]
    return {"state": {name: value.detach() for name, value in guide.state_dict().items()}, "losses": losses}


def spread():
    """Parameters are in the process that has them alone, but for the time in which they are used."""
    torch.manual_seed(0)
    flow = moved(glow((1, 8, 8), num_levels=2, num_steps=1, hidden_channels=8), torch.float64)
    numbers = {}

    def objective(flow, x, context):
        if flow.training:
            numbers["own"] = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in flow.parameters())
        return negative_log_likelihood(flow, x, context)

    options = {**FIFTY, "epochs": 2, "ema_decay": 0.9, "strategy": "fsdp", "objective": objective}
    found = result_of(flow, fit(flow, pictures().double(), **options))
    share = numbers["own"] / sum(p.numel() for p in flow.parameters())
    assert share == 1 if processes() == 1 else 0.4 < share < 0.6
    return found


def parts():
    flow = small("none")
    return result_of(flow, fit(flow, table(), **{**OPTIONS, "epochs": 2, "accumulate": 3, "batch_size": 31}))


def weighted():
    flow, weights = small(), torch.rand(300, generator=torch.Generator().manual_seed(1))
    return result_of(flow, fit(flow, table(), weights=weights, **{**OPTIONS, "epochs": 2}))


def loader():
    flow = small("batchnorm")
    batches = DataLoader(TensorDataset(table()), batch_size=30, shuffle=True, generator=None)
    options = {**OPTIONS, "batch_size": None, "epochs": 2, "validation": table(40)}
    return result_of(flow, fit(flow, batches, **options))


def mapped(folder):
    flow = small()
    return result_of(flow, fit(flow, np.load(f"{folder}/table.npy", mmap_mode="r"), **{**OPTIONS, "epochs": 2}))


def stopped_early():
    flow = small()
    options = {**OPTIONS, "learning_rate": 0.1, "patience": 2, "epochs": 200, "schedule": "constant"}
    return result_of(flow, fit(flow, table(), **options))


def skipping(flow, x, context):
    loss = negative_log_likelihood(flow, x, context)
    # One row of the data is in the batch of one process alone: all leave its steps out.
    return loss * torch.inf if flow.training and (x == table()[7]).all(-1).any() else loss


def skipped():
    flow = small()
    result = fit(flow, table(), **{**OPTIONS, "objective": skipping, "epochs": 4})
    return {**result_of(flow, result), "skipped": result.skipped_steps}


COMPARED = {
    **{
        f"{kind} {name}": lambda _, kind=kind, dtype=dtype: fifty_steps(kind, dtype)
        for kind in ("actnorm", "batchnorm", "glow")
        for name, dtype in DTYPES.items()
    },
    **{f"guide {name}": lambda _, dtype=dtype: guide(dtype) for name, dtype in DTYPES.items()},
    "subsampled float64": lambda _: subsampled(),
    "channels last float64": lambda _: fifty_steps("glow", torch.float64, channels_last=True),
    "spread float64": lambda _: spread(),
    "parts float64": lambda _: parts(),
    "weighted float64": lambda _: weighted(),
    "loader float64": lambda _: loader(),
    "mapped float64": mapped,
    "stopped early float64": lambda _: stopped_early(),
    "skipped float64": lambda _: skipped(),
}


# What is of two processes alone


def noise(folder):
    """Within a step each process draws its own numbers, and the same in another fit of this seed."""
    seen = []

    def objective(flow, x, context):
        seen.append(torch.rand(()).item())
        return negative_log_likelihood(flow, x, context)

    def fitted():
        fit(small(dropout=0.5), table(), objective=objective, **{**OPTIONS, "epochs": 1})

    fitted()
    first = seen[:]
    seen.clear()
    fitted()
    after = torch.rand(()).item()
    return {"first": first, "again": seen, "after": after}


def dequantized(folder):
    flow = small()
    flow.dequantizer = UniformDequantizer(3, num_levels=8).double()
    levels = torch.randint(0, 8, (200, 3), generator=torch.Generator().manual_seed(0))
    return result_of(flow, fit(flow, levels, **{**OPTIONS, "epochs": 2}))


def unseeded(folder):
    """Other weights, and other random numbers, in each process: those of the first are taken."""
    torch.manual_seed(distributed_rank())
    flow = realnvp(3, num_layers=2, hidden_features=(8,), permutation="shuffle").double()
    return result_of(flow, fit(flow, table(), **{**OPTIONS, "epochs": 2, "seed": None}))


def out_of_time(folder):
    flow = small()
    return result_of(flow, fit(flow, table(), **{**OPTIONS, "epochs": 10**6, "patience": None, "max_seconds": 0.2}))


def shards(folder):
    """Batches of which each process reads its own, once an epoch."""
    seen = []

    def objective(flow, x, context):
        if flow.training:
            seen.append(x[:, 0])
        return negative_log_likelihood(flow, x, context)

    options = {**OPTIONS, "batch_size": None, "epochs": 1, "objective": objective}
    fit(small(), ParquetBatches(f"{folder}/table.parquet", 25, buffer_rows=40), **options)
    from_file = torch.cat(seen)
    seen.clear()
    data = TensorDataset(table())
    fit(small(), DataLoader(data, batch_size=10, sampler=DistributedSampler(data, drop_last=True)), **options)
    return {"file": from_file, "loader": torch.cat(seen)}


def uneven(folder):
    """Streams of which one ends early, or one with a batch too small for all."""
    rank = distributed_rank()

    class Sharded(list):
        sharded = True

    options = {**OPTIONS, "batch_size": None, "epochs": 2}
    rows = table()
    results = [
        fit(small(), Sharded(rows[:120].split(10 + rank)), **options),
        fit(small(), [rows[:20], rows[20:21], rows[21:40]], **options),
    ]
    return {"steps": [result.steps for result in results], "train": [result.history["train"] for result in results]}


def different(folder):
    messages = []
    rank = distributed_rank()
    for flow, data, options in (
        (small(), table() + rank, {}),
        (small("batchnorm" if rank else "actnorm"), table(), {}),
        (small(), table(), {"learning_rate": 0.1 * (1 + rank)}),
        (small(), table(), {"batch_size": 1}),
    ):
        try:
            fit(flow, data, **{**OPTIONS, "epochs": 1, **options})
        except ValueError as error:
            messages.append(str(error))
    return {"messages": messages}


def interrupted(folder, strategy="ddp"):
    """Stop in the middle of the second epoch, and go on from the checkpoint."""
    options = {**OPTIONS, "batch_size": 64, "epochs": 2, "strategy": strategy, "ema_decay": 0.9}

    def fitted(at=None, **more):
        left = [at]

        def objective(flow, x, context):
            if flow.training and left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    raise InterruptedError
            return negative_log_likelihood(flow, x, context)

        flow = small("batchnorm", dropout=0.3)
        return result_of(flow, fit(flow, table(), objective=objective, **{**options, **more}))

    whole = fitted()
    file = {"checkpoint": f"{folder}/{strategy}.pt", "checkpoint_steps": 5}
    with contextlib.suppress(InterruptedError):
        fitted(at=7, **file)
    return {"whole": whole, "resumed": fitted(**file)}


def interrupted_where_spread(folder):
    return interrupted(folder, "fsdp")


def taken_in_turn(folder):
    with distributed.together(torch.device("cpu")):
        return {"found": list(distributed.in_turn(lambda n: (n * n, distributed.rank()), range(5)))}


ALONE = (
    noise, dequantized, unseeded, out_of_time, shards, uneven, different, interrupted, interrupted_where_spread,
    taken_in_turn,
)  # fmt: skip


def processes():
    return int(os.environ.get("WORLD_SIZE", 1))


def distributed_rank():
    return int(os.environ.get("RANK", 0))


# The tests


def torchrun(*arguments, options=(), timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    started = subprocess.Popen(
        [*command, __file__, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        errors = started.communicate(timeout=timeout)[1]
    finally:
        started.terminate()  # which ends its processes too; kill would leave them
    assert started.returncode == 0, errors[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("distributed")
    rows = table().numpy()
    np.save(folder / "table.npy", rows)
    columns = pa.table({f"column {i}": rows[:, i] for i in range(3)})
    parquet.write_table(columns, folder / "table.parquet", row_group_size=70)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What every case came to in each of two processes."""
    torchrun("cases", folder)
    return [torch.load(folder / f"found.{rank}", weights_only=False) for rank in range(2)]


def equal(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("case", COMPARED)
def test_two_processes_come_to_what_one_comes_to(two, folder, case):
    one, (first, second) = COMPARED[case](folder), (found[case] for found in two)
    assert equal(first, second)
    tolerance = TOLERANCE[case.split()[-1]]
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)
    for name in {"steps", "stopped", "skipped"} & one.keys():
        assert first[name] == one[name], name
    if "history" in one:
        for name, values in one["history"].items():
            assert first["history"][name] == pytest.approx(values, rel=1e-3 if "32" in case else 1e-8), name


def test_the_cases_are_what_they_say(two):
    found = two[0]
    assert found["actnorm float64"]["steps"] == 50
    assert found["stopped early float64"]["stopped"] == "no better validation loss in 3 epochs"
    assert found["skipped float64"]["skipped"] in range(3, 6)


def test_random_numbers_within_a_step_are_each_processs_own(two):
    first, second = (found["noise"] for found in two)
    for own in (first, second):
        assert own["first"] == own["again"]
    assert not set(first["first"]) & set(second["first"])
    assert first["after"] == second["after"]


@pytest.mark.parametrize("case", ["dequantized", "unseeded", "out_of_time", "uneven"])
def test_all_processes_end_with_the_same(two, case):
    first, second = (found[case] for found in two)
    assert equal(first, second)


def test_all_end_in_time(two):
    assert two[0]["out_of_time"]["stopped"] == "max_seconds=0.2 reached"


def test_shards_do_not_overlap(two):
    first, second = (found["shards"] for found in two)
    rows = set(table()[:, 0].tolist())
    for name, number in (("file", 300), ("loader", 300)):
        seen = [*first[name].tolist(), *second[name].tolist()]
        assert len(seen) == len(set(seen)) == number
        assert set(seen) <= rows


def test_an_epoch_ends_with_the_stream_that_ends_first(two):
    assert two[0]["uneven"]["steps"] == [2 * 11, 2 * 2]


def test_processes_about_different_fits_are_refused(two):
    for found in two:
        assert found["different"]["messages"] == [
            "expected the same data in every process; got another in process 1 than in 0",
            "expected the same flow in every process; got another in process 1 than in 0",
            "expected the same learning_rate in every process; got another in process 1 than in 0",
            "expected at least one row of a batch for each process; got batch_size=1",
        ]


def test_two_processes_go_on_from_a_checkpoint(two, folder):
    for found in two:
        assert equal(found["interrupted"]["whole"], found["interrupted"]["resumed"])
        where_spread = found["interrupted_where_spread"]
        assert equal(where_spread["whole"], where_spread["resumed"])
    assert {path.name for path in folder.glob("*.pt*")} == {"ddp.pt", "fsdp.pt"}


def test_work_on_a_stream_comes_back_in_order(two):
    assert two[0]["taken_in_turn"]["found"] == [(0, 0), (1, 1), (4, 0), (9, 1), (16, 0)]
    assert two[1]["taken_in_turn"]["found"] == []


def test_a_process_alone_is_in_step_with_itself(folder):
    assert distributed.world_size() == 1
    assert distributed.rank() == 0
    assert list(distributed.in_turn(lambda n: n * n, range(3))) == [0, 1, 4]
    rows = torch.cat(list(map(torch.tensor, ParquetBatches(folder / "table.parquet", 30))))
    assert sorted(rows[:, 0].tolist()) == sorted(table()[:, 0].tolist())
    with pytest.raises(TypeError, match="expected an ELBO; got int"):
        DistributedELBO(3)


# Data in files


def test_mapped_data_are_those_in_memory(folder):
    mapped = np.load(folder / "table.npy", mmap_mode="r")
    for context in (None, np.array(mapped[:, :2]), np.load(folder / "table.npy", mmap_mode="r")[:, :2]):
        features = {} if context is None else {"context_features": 2}
        options = {**OPTIONS, "epochs": 2, "validation": 0.2}
        first, second = small("batchnorm", **features), small("batchnorm", **features)
        wanted = fit(first, np.array(mapped), context=None if context is None else np.array(context), **options)
        found = fit(second, mapped, context=context, **options)
        assert equal(result_of(first, wanted), result_of(second, found))


def test_mapped_data_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pyroflows.training.prepare._CHECKED_NUMBERS", 60)
    most, read = [0], MappedArray.__getitem__

    def counted(self, rows):
        found = read(self, rows)
        most[0] = max(most[0], len(found))
        return found

    monkeypatch.setattr(MappedArray, "__getitem__", counted)
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(1000, 3))
    array[:] = torch.randn(1000, 3).numpy()
    fit(small(dtype=torch.float32), array, **{**OPTIONS, "epochs": 1, "validation": 0.05})
    assert most[0] == 50  # the rows held out; a batch has 32


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x.__setitem__((777, 1), np.nan), "expected finite numbers in data; got NaN in row 777, column 1 "),
        (lambda x: x.__setitem__((slice(None), 2), 3.0), "since a constant one has no density; got column 2"),
    ],
)
def test_what_is_wrong_in_mapped_data_is_named(tmp_path, monkeypatch, spoil, message):
    monkeypatch.setattr("pyroflows.training.prepare._CHECKED_NUMBERS", 60)
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float64, shape=(1000, 3))
    array[:] = torch.randn(1000, 3).numpy()
    spoil(array)
    with pytest.raises(ValueError, match=message):
        fit(small(), array, **OPTIONS)
    with pytest.raises(ValueError, match="expected a context for each of 1000 rows; got"):
        fit(small(context_features=1), array, context=torch.zeros(999, 1).double(), **OPTIONS)


def test_a_distributed_sampler_shuffles_every_epoch_anew():
    data, seen = TensorDataset(table(60)), []

    def objective(flow, x, context):
        seen.append(x[:, 0])
        return negative_log_likelihood(flow, x, context)

    batches = DataLoader(data, batch_size=20, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    options = {**OPTIONS, "batch_size": None, "epochs": 2, "validation": None, "objective": objective}
    for _ in range(2):
        fit(small(), batches, **options)
    first, second, *again = torch.cat(seen).split(60)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.equal(torch.cat(again), torch.cat([first, second]))


def test_numbers_in_another_order_of_bytes_are_the_same(tmp_path):
    rows = table().numpy()
    np.save(tmp_path / "x.npy", rows.astype(">f8"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    first, second, third = (fit(small(), x, **{**OPTIONS, "epochs": 1}) for x in (rows, rows.astype(">f8"), mapped))
    assert first.history["validation"] == second.history["validation"] == third.history["validation"]
    np.save(tmp_path / "pairs.npy", np.zeros((4, 3), [("a", "f8"), ("b", "f8")]))
    with pytest.raises(TypeError, match="expected data as a tensor or an array of numbers; got ndarray"):
        fit(small(), np.load(tmp_path / "pairs.npy", mmap_mode="r"), **OPTIONS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"columns": ["column 7"]}, "expected a column 'column 7' in .*; got 'column 0', 'column 1', 'column 2'"),
        ({"batch_size": 301}, "expected at least batch_size=301 rows in .*; got 300"),
        ({"buffer_rows": 0}, "expected buffer_rows to be a positive integer; got 0"),
    ],
)
def test_messages_of_parquet_batches(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ParquetBatches(folder / "table.parquet", **{"batch_size": 30, **options})
    with pytest.raises(ValueError, match="expected a Parquet file; got .*table.npy: "):
        ParquetBatches(folder / "table.npy", 30)


def test_parquet_batches_of_other_columns_and_of_a_damaged_file(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    cells = {
        "number": [0.5, None, 1.5],
        "flag": [True, None, False],
        "count": [2**62, 1, None],
        "text": ["a", "b", "c"],
    }
    cells["price"] = pa.array([1, 2, 3], pa.decimal128(9, 2))
    parquet.write_table(pa.table(cells), tmp_path / "table", compression="none")
    numbers = ["number", "flag", "count", "price"]
    rows = next(iter(ParquetBatches(tmp_path / "table", 3, columns=numbers)))
    wanted = np.array([[0.5, 1, 2**62, 1], [np.nan, np.nan, 1, 2], [1.5, 0, np.nan, 3]])
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 3])], wanted)
    with pytest.raises(ValueError, match=r"expected columns of numbers in .*; got 'text' of (large_)?string"):
        ParquetBatches(tmp_path / "table", 3)
    with pytest.raises(ValueError, match="expected at least one column of data in .*; got none"):
        ParquetBatches(tmp_path / "table", 3, columns=[], context=["number"])
    content = (tmp_path / "table").read_bytes()
    (tmp_path / "damaged").write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(ValueError, match="expected a Parquet file; got .*damaged: "):
        list(ParquetBatches(tmp_path / "damaged", 3, columns=numbers))


def test_parquet_batches_of_columns_and_context(folder):
    torch.manual_seed(0)
    batches = ParquetBatches(folder / "table.parquet", 100, columns=["column 2"], context=["column 0", "column 1"])
    pairs = list(batches)
    assert [(x.shape, context.shape) for x, context in pairs] == [((100, 1), (100, 2))] * 3
    again = np.concatenate([x for x, _ in batches])
    assert not np.array_equal(np.concatenate([x for x, _ in pairs]), again)
    flow = small(context_features=2, features=1)
    assert fit(flow, batches, **{**OPTIONS, "batch_size": None, "epochs": 2, "validation": None}).steps == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "dp"}, "expected strategy to be one of 'auto', 'ddp', 'fsdp'; got 'dp'"),
        ({"strategy": "fsdp", "compile": True}, "strategy='fsdp' cannot be combined with compile=True"),
        ({"checkpoint_steps": 3}, "expected checkpoint_steps only with a checkpoint; got 3 without"),
    ],
)
def test_messages_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        fit(small(), table(), **OPTIONS, **options)


# Killed


class Dies:
    """A file that kills its process after so many bytes, or when it is closed."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def killed_fits(folder, kills):
    """Kill a fit at random moments, half of them in the middle of a write, and let it go on each time."""
    path, chance = f"{folder}/killed.pt", random.Random(0)
    count = 0
    while True:
        save, share = chance.randrange(1, 6), chance.random()
        child = os.fork()
        if not child:
            if count < kills and count % 2:
                die_while_saving(save, share)
            run_to(f"{folder}/weights.pt", kills, checkpoint=path, checkpoint_steps=1)
            os._exit(0)
        moment = chance.uniform(0.0, 0.25)
        if count < kills and not count % 2:
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.path.exists(path):
            torch.load(path)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        count += 1
    print(count)


def die_while_saving(number, share):
    """Die in a write of the checkpoint: in the middle, before it is put in place, or right after."""
    save, replace, left = torch.save, os.replace, [number]

    def dying_save(state, file):
        left[0] -= 1
        if not left[0] and share < 0.5:
            file = Dies(file, int(20_000 * share))
        save(state, file)

    def dying_replace(new, old):
        if left[0] <= 0 and share < 0.75:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(new, old)
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.replace = dying_save, dying_replace


def run_to(path, kills, **options):
    flow = small("batchnorm", torch.float32, dropout=0.1)
    fit(flow, table(), ema_decay=0.9, **{**OPTIONS, "epochs": 3 * kills}, **options)
    torch.save(flow.state_dict(), path)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_fit_that_is_killed_again_and_again_goes_on_to_the_same_weights(tmp_path, kills):
    ended = subprocess.run(
        [sys.executable, __file__, "kills", tmp_path, str(kills)], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert int(ended.stdout.split()[-1]) == kills
    run_to(tmp_path / "wanted.pt", kills)
    assert equal(torch.load(tmp_path / "wanted.pt"), torch.load(tmp_path / "weights.pt"))
    assert {p.name for p in tmp_path.iterdir()} == {"wanted.pt", "weights.pt", "killed.pt"}


@pytest.mark.slow
def test_a_killed_worker_costs_a_restart(tmp_path):
    torchrun("worker", tmp_path, "never")
    undisturbed = torch.load(tmp_path / "weights.0")
    (tmp_path / "fit.pt").unlink()
    torchrun("worker", tmp_path, "once", options=["--max-restarts=1"])
    assert (tmp_path / "killed").exists()
    assert equal(torch.load(tmp_path / "weights.0"), undisturbed)
    assert equal(torch.load(tmp_path / "weights.1"), undisturbed)


def worker(folder, when):
    """Fit; the second process dies once, in the middle of a step."""
    steps = [0]

    def objective(flow, x, context):
        steps[0] += flow.training
        if (
            when == "once"
            and steps[0] == 30
            and distributed_rank() == 1
            and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        ):
            open(f"{folder}/killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return negative_log_likelihood(flow, x, context)

    flow = small("batchnorm", dropout=0.3)
    options = {**OPTIONS, "epochs": 10, "checkpoint": f"{folder}/fit.pt", "checkpoint_steps": 5}
    fit(flow, table(), objective=objective, **options)
    torch.save(flow.state_dict(), f"{folder}/weights.{distributed_rank()}")


@pytest.mark.slow
def test_a_posterior_is_the_same_in_all_processes(tmp_path):
    torchrun("posterior", tmp_path)
    first, second = (torch.load(tmp_path / f"posterior.{rank}") for rank in range(2))
    assert equal(first, second)
    one = posteriors()
    assert first["seeded"]["elbo"] == pytest.approx(one["seeded"]["elbo"], abs=0.01)
    assert first["unseeded"]["elbo"] == pytest.approx(one["unseeded"]["elbo"], abs=0.01)
    assert first["seeded"]["verdict"] == one["seeded"]["verdict"] == "trust"
    assert "the fit ended at max_seconds=0.5" in first["timed"]["notes"]


def posteriors():
    y, found = observations(torch.float32), {}
    torch.manual_seed(distributed_rank())
    for name, options in {"seeded": {"seed": 0}, "unseeded": {}, "timed": {"max_seconds": 0.5}}.items():
        posterior = fit_posterior(likelihood, y, max_steps=500, **options)
        found[name] = {
            "state": posterior.guide.flow.state_dict(),
            "elbo": posterior.elbo,
            "verdict": posterior.verdict,
            "reason": posterior.reason,
            "notes": posterior.notes,
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "cases":
        found = {}
        for name, case in {**COMPARED, **{case.__name__: case for case in ALONE}}.items():
            found[name] = case(folder)
        torch.save(found, f"{folder}/found.{distributed_rank()}")
    elif what == "posterior":
        torch.save(posteriors(), f"{folder}/posterior.{distributed_rank()}")
    elif what == "kills":
        killed_fits(folder, int(rest[0]))
    else:
        worker(folder, *rest)
