"""The command line on tables: fits, scores, samples and checks, in pipes too; what is wrong takes one line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Stream
from sklearn.datasets import load_diabetes, load_iris

from pyroflows.cli import main
from pyroflows.cli.sample import _values
from pyroflows.data import open_table, write_table
from pyroflows.flow import load

SMALL = ["--num-layers", "2", "--hidden-features", "16", "--epochs", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with real tables and models of them."""
    folder = tmp_path_factory.mktemp("cli")
    iris = load_iris(as_frame=True)
    frame = iris.frame.rename(columns=lambda name: name.removesuffix(" (cm)").replace(" ", "_"))
    frame["species"] = iris.target_names[frame.pop("target")]
    frame.to_csv(folder / "iris.csv", index=False)
    load_diabetes(as_frame=True, scaled=False).frame.to_csv(folder / "diabetes.csv", index=False)
    columns = ",".join(frame.columns[:4])
    nsf = ["--columns", columns, "--flow", "nsf"]
    assert main(["fit", f"{folder}/iris.csv", "-o", f"{folder}/iris", *nsf, *SMALL, "--quiet"]) == 0
    given = ["--given", "species", "--categories", "species"]
    assert main(["fit", f"{folder}/iris.csv", "-o", f"{folder}/given", *given, *SMALL, "--quiet"]) == 0
    whole = ["--columns", "age,bmi,bp", "--given", "target"]
    assert main(["fit", f"{folder}/diabetes.csv", "-o", f"{folder}/whole", *whole, *SMALL, "--quiet"]) == 0
    return folder


def said(capsys, *arguments, status=0):
    """Run a command, and give what it wrote to standard output; where it is to fail, the line it wrote to the other."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    if status == 0:
        return out
    assert err.count("\n") == 1, err
    assert out == ""
    return err


def said_in_json(capsys, *arguments, status=0):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == status
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


# A fit, and what one does with it


def test_a_fit_says_what_it_did(capsys, folder, tmp_path):
    arguments = ["fit", folder / "diabetes.csv", "-o", tmp_path / "m", "--columns", "age,bmi", "--flow", "nsf", *SMALL]
    found = said_in_json(capsys, *arguments, "--set", "num_bins=4", "--seed", "3")
    assert found["columns"] == ["age", "bmi"]
    assert found["integer_columns"] == ["age"]
    assert found["rows"] == 442
    assert found["epochs"] == 3
    assert math.isfinite(found["best_loss"])
    text = said(capsys, *arguments, "--set", "num_bins=4", "--seed", "3")
    assert text.startswith("nsf of 2 columns (age, bmi), whole numbers in age: ")
    assert f"validation loss {found['best_loss']:.4f} nats a row" in text
    assert said(capsys, *arguments, "--quiet") == ""
    notes = load(tmp_path / "m").notes
    assert notes["data"] == "diabetes.csv"
    assert len(notes["history"]["train"]) == 3


def test_copies_of_a_row_are_not_both_learned_from_and_held_out(capsys, tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 2)).repeat(20, 0)
    np.save(tmp_path / "copies.npy", rows)
    few = ["--num-layers", "2", "--hidden-features", "32", "--learning-rate", "0.01", "--epochs", "20", "--seed", "2"]
    found = said_in_json(capsys, "fit", tmp_path / "copies.npy", "-o", tmp_path / "m", *few)
    # The entropy is 2.84, give or take 0.45 for the five rows held out; a flow that has learned these has 1.7.
    assert found["rows"] == 1000
    assert found["best_loss"] > 2.4
    np.savez(tmp_path / "zeros.npz", np.where(rows[:, :1] < 0.5, 0, rows[:, :1]))  # of which most are one value
    zeros = said_in_json(capsys, "fit", tmp_path / "zeros.npz", "-o", tmp_path / "m", *SMALL, "--flow", "nsf")
    assert zeros["best_epoch"] is not None


def test_the_same_seed_gives_the_same_model(folder, tmp_path):
    fits = [["--seed", "1"], ["--seed", "1"], ["--seed", "2"]]
    for number, seed in enumerate(fits):
        path, out = f"{folder}/diabetes.csv", f"{tmp_path}/{number}"
        assert main(["fit", path, "-o", out, "--columns", "age,bmi", *SMALL, *seed, "--quiet"]) == 0
    same, again, other = (load(tmp_path / str(number)).state_dict() for number in range(3))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not all(torch.equal(same[name], other[name]) for name in same)


@pytest.mark.parametrize("ending", ["csv", "parquet", "npy", "npz"])
def test_scores_are_those_of_the_flow(capsys, folder, tmp_path, ending):
    flow = load(folder / "iris")
    x = torch.from_numpy(open_table(folder / "iris.csv", flow.notes["columns"]).read()).float()
    wanted = flow.log_prob(x).detach().numpy()
    data = tmp_path / f"data.{ending}"
    write_table(
        data,
        flow.notes["columns"][::-1] if ending in ("csv", "parquet") else flow.notes["columns"],
        [x.numpy()[:, ::-1] if ending in ("csv", "parquet") else x.numpy()],
    )  # columns are found by their names, where the file has names
    found = said_in_json(capsys, "score", folder / "iris", data, "-o", tmp_path / f"scores.{ending}")
    scores = open_table(tmp_path / f"scores.{ending}").read()[:, 0]
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert found["rows"] == 150
    assert found["mean_log_prob"] == pytest.approx(wanted.mean(), abs=1e-5)
    assert found["standard_error"] == pytest.approx(wanted.std(ddof=1) / math.sqrt(150), abs=1e-6)
    assert found["lower_bound"] is None
    assert found["rows_per_second"] > 0
    assert "150 rows" in said(capsys, "score", folder / "iris", data)


def test_chunks_change_nothing(capsys, folder, tmp_path, monkeypatch):
    arguments = ["score", folder / "iris", folder / "iris.csv"]
    whole = said_in_json(capsys, *arguments, "-o", tmp_path / "whole.npy")
    monkeypatch.setattr("pyroflows.cli.score._ROWS", 7)
    parts = said_in_json(capsys, *arguments, "-o", tmp_path / "parts.npy")
    assert np.load(tmp_path / "parts.npy") == pytest.approx(np.load(tmp_path / "whole.npy"), abs=1e-5)
    for name in ("rows", "mean_log_prob", "standard_error"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-6)


def test_whole_numbers_get_a_bound_and_come_back_whole(capsys, folder, tmp_path):
    scores = {}
    for draws in (1, 64):
        arguments = ["score", folder / "whole", folder / "diabetes.csv", "--draws", draws]
        found = said_in_json(capsys, *arguments)
        scores[draws] = found["mean_log_prob"]
        assert found["lower_bound"] == f"log-mean-exp over {draws} draws of noise on age"
        assert f"a lower bound by log-mean-exp over {draws} draws" in said(capsys, *arguments)
        assert said_in_json(capsys, *arguments)["mean_log_prob"] == scores[draws]
    assert scores[64] > scores[1]
    new = tmp_path / "new.csv"
    said(capsys, "sample", folder / "whole", "-n", 50, "-o", new, "--given", "target=120")
    frame = pd.read_csv(new)
    assert list(frame.columns) == ["age", "bmi", "bp", "target"]
    assert frame["age"].dtype == np.int64
    assert (frame["target"] == 120).all()


def test_samples_have_the_columns_of_the_data_and_can_be_scored(capsys, folder, tmp_path):
    for ending in ("csv", "parquet", "npy", "npz"):
        new = tmp_path / f"new.{ending}"
        assert said(capsys, "sample", folder / "iris", "-n", 200, "-o", new, "--seed", 5).startswith("200 rows in ")
        table = open_table(new)
        if table.named:
            assert table.columns == load(folder / "iris").notes["columns"]
        assert table.read() == pytest.approx(open_table(tmp_path / "new.csv").read())
        assert said_in_json(capsys, "score", folder / "iris", new)["rows"] == 200
    assert said_in_json(capsys, "sample", folder / "iris", "-n", 200, "-o", tmp_path / "other.npy")["rows"] == 200
    assert not np.array_equal(np.load(tmp_path / "other.npy"), np.load(tmp_path / "new.npy"))


def test_a_conditional_model_takes_what_is_given(capsys, folder, tmp_path):
    new, data = tmp_path / "new.csv", folder / "iris.csv"
    said(capsys, "sample", folder / "given", "-n", 3, "-o", new, "--given", data)
    frame = pd.read_csv(new)
    assert len(frame) == 450
    assert list(frame["species"][::3]) == list(pd.read_csv(data)["species"])
    assert list(frame["species"][:3]) == ["setosa"] * 3
    # Trained a little, it already knows which flowers are large: petals differ by four centimetres between species.
    means = frame.groupby("species")["petal_length"].mean()
    assert means["setosa"] < means["versicolor"] < means["virginica"]
    scores = {}
    for name in ("setosa", "virginica"):
        frame.assign(species=name).to_csv(new, index=False)
        scores[name] = said_in_json(capsys, "score", folder / "given", new)["mean_log_prob"]
        said(capsys, "sample", folder / "given", "-n", 4, "-o", tmp_path / "x.parquet", "--given", f"species={name}")
        assert list(pd.read_parquet(tmp_path / "x.parquet")["species"]) == [name] * 4
    assert scores["setosa"] != scores["virginica"]


def test_more_rows_than_fit_into_a_chunk_are_drawn(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pyroflows.cli.sample._ROWS", 7)
    pd.read_csv(folder / "iris.csv")[45:55].to_csv(tmp_path / "given.csv", index=False)
    for given, rows in ((["--given", "species=setosa"], 20), (["--given", str(tmp_path / "given.csv")], 200)):
        said(capsys, "sample", folder / "given", "-n", 20, "-o", tmp_path / "new.csv", *given)
        frame = pd.read_csv(tmp_path / "new.csv")
        assert len(frame) == rows
        assert not frame.iloc[:, :4].duplicated().any()
    assert list(frame["species"][::20]) == ["setosa"] * 5 + ["versicolor"] * 5


def test_categories_and_numbers_may_be_given_together(capsys, folder, tmp_path):
    arguments = ["--given", "species,petal_width", "--categories", "species", "--columns", "sepal_length", *SMALL]
    said(capsys, "fit", folder / "iris.csv", "-o", tmp_path / "m", *arguments)
    assert said_in_json(capsys, "score", tmp_path / "m", folder / "iris.csv")["rows"] == 150
    said(capsys, "sample", tmp_path / "m", "-o", tmp_path / "x.csv", "--given", "species=virginica, petal_width=1.5")
    frame = pd.read_csv(tmp_path / "x.csv")
    assert list(frame.columns) == ["sepal_length", "species", "petal_width"]
    assert said_in_json(capsys, "check", tmp_path / "m", folder / "iris.csv")["ok"]


def test_check_info_bench_and_plot(capsys, folder, tmp_path):
    for name, data in (("given", "iris"), ("whole", "diabetes")):
        assert "ok" in said(capsys, "check", folder / name, folder / f"{data}.csv", "--rows", 20)
        found = said_in_json(capsys, "bench", folder / name, "--rows", 64, "--seconds", 0.01)
        assert all(speed > 0 for speed in found["flows"][str(folder / name)].values())
        said(capsys, "plot", folder / name, "-o", tmp_path / "curves.svg")
        assert b"<svg" in (tmp_path / "curves.svg").read_bytes()
    found = said_in_json(
        capsys, "check", folder / "iris", folder / "iris.csv", "--rows", 5, "--tolerance", 1e-30, status=1
    )
    assert not found["ok"]
    text = said(capsys, "info", folder / "given")
    assert "species (setosa, versicolor, virginica)" in text
    found = said_in_json(capsys, "info", folder / "whole")
    assert found["notes"]["columns"] == ["age", "bmi", "bp"]
    assert found["parameters"] == sum(p.numel() for p in load(folder / "whole").parameters())
    assert "torch" in found["versions"]
    assert set(said_in_json(capsys, "bench", "--flows", "nice", "--rows", 8, "--seconds", 0.01)["flows"]) == {"nice"}


def test_pairs_are_drawn(capsys, folder, tmp_path):
    for name, data in (("given", "iris"), ("whole", "diabetes")):
        picture = tmp_path / f"{name}.png"
        said(capsys, "plot", folder / name, folder / f"{data}.csv", "-o", picture, "--rows", 100, "--columns", 2)
        assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_flow_saved_without_notes_takes_columns_in_their_order(capsys, folder, tmp_path):
    flow = load(folder / "iris")
    flow.save(tmp_path / "m", notes={"columns": 4})  # a note of the user's own
    frame = pd.read_csv(folder / "iris.csv").drop(columns="species")
    frame.to_csv(tmp_path / "x.csv", index=False)
    wanted = said_in_json(capsys, "score", folder / "iris", tmp_path / "x.csv")["mean_log_prob"]
    assert said_in_json(capsys, "score", tmp_path / "m", tmp_path / "x.csv")["mean_log_prob"] == wanted
    assert "expected 4 columns in iris.csv; got 5" in said(
        capsys, "score", tmp_path / "m", folder / "iris.csv", status=1
    )


# Tables that one meets


def fit_of(capsys, tmp_path, text, *more, status=1):
    path = tmp_path / "data.csv"
    path.write_text(text)
    return said(capsys, "fit", path, "-o", tmp_path / "m", *SMALL, *more, status=status)


ROWS = "".join(f"{number}.5,{number % 7}\n" for number in range(40))


def test_a_table_is_refused_by_row_and_column(capsys, tmp_path):
    line = fit_of(capsys, tmp_path, f"a,b\n{ROWS},1\n")
    assert line == "pyroflows: expected numbers in column 'a' of data.csv; got a missing value in row 41 (line 42)\n"
    line = fit_of(capsys, tmp_path, f"a,b\n{ROWS}1,x\n")
    assert line == "pyroflows: expected numbers in column 'b' of data.csv; got 'x' in row 41 (line 42)\n"
    line = fit_of(capsys, tmp_path, f"a,b\n{ROWS}inf,1\n")
    assert line == "pyroflows: expected numbers in column 'a' of data.csv; got inf in row 41 (line 42)\n"
    line = fit_of(capsys, tmp_path, "a,b\n" + "".join(f"{number}.5,3\n" for number in range(40)))
    assert "expected columns that vary, since a constant one has no density; got column 'b'" in line
    assert "expected at least one row in data.csv; got none" in fit_of(capsys, tmp_path, "a,b\n")
    assert "at least 2 rows" in fit_of(capsys, tmp_path, "a,b\n1,2\n")
    assert "a first line of column names" in fit_of(capsys, tmp_path, ROWS)
    assert not (tmp_path / "m").exists()


def test_numbers_that_rounding_blurs_are_refused(capsys, tmp_path):
    text = "time\n" + "".join(f"{1700000000 + number}.25\n" for number in range(100))
    line = fit_of(capsys, tmp_path, text)
    assert "in column 'time' of data.csv: --dtype float64 does" in line
    fit_of(capsys, tmp_path, text, "--dtype", "float64", "--flow", "nsf", status=0)
    assert said_in_json(capsys, "check", tmp_path / "m", tmp_path / "data.csv")["tolerance"] == 1e-6


def test_numbers_out_of_range_are_refused(capsys, folder, tmp_path):
    assert "got 1e+39, beyond the range of float32, in row 41" in fit_of(capsys, tmp_path, f"a,b\n{ROWS}1e39,1\n")
    assert "expected numbers whose squares float32 holds; got 1e+30" in fit_of(capsys, tmp_path, f"a,b\n{ROWS}1e30,1\n")
    frame = pd.read_csv(folder / "iris.csv").astype({"petal_width": float})
    for number, line in ((1e39, "got 1e+39, beyond the range of float32, in row 8 (line 9)"), (1e30, None)):
        frame.loc[7, "petal_width"] = number
        frame.to_csv(tmp_path / "x.csv", index=False)
        if line is None:  # it has a place, but no density that a float holds
            found = said_in_json(capsys, "score", folder / "iris", tmp_path / "x.csv")
            assert found["not_finite"] == 1
            assert found["mean_log_prob"] is None
            assert "1 of them without a finite value" in said(capsys, "score", folder / "iris", tmp_path / "x.csv")
        else:
            assert line in said(capsys, "score", folder / "iris", tmp_path / "x.csv", status=1)


def test_what_is_read_is_not_overwritten(capsys, folder, tmp_path):
    frame = pd.read_csv(folder / "iris.csv")
    path = tmp_path / "x.csv"
    frame.to_csv(path, index=False)
    before = path.read_bytes()
    for arguments in (
        ["fit", path, "-o", path],
        ["score", folder / "iris", path, "-o", path],
        ["sample", folder / "given", "-o", path, "--given", path],
    ):
        assert "expected an output other than the files that are read" in said(capsys, *arguments, status=1)
    assert path.read_bytes() == before


def test_one_row_is_scored_and_none_is_refused(capsys, folder, tmp_path):
    frame = pd.read_csv(folder / "iris.csv")
    frame[:1].to_csv(tmp_path / "one.csv", index=False)
    frame[:0].to_csv(tmp_path / "none.csv", index=False)
    found = said_in_json(capsys, "score", folder / "iris", tmp_path / "one.csv")
    assert found["rows"] == 1
    assert found["standard_error"] is None
    assert "1 row," in said(capsys, "score", folder / "iris", tmp_path / "one.csv")
    for command in (["score"], ["check"], ["plot", "-o", tmp_path / "x.png"]):
        line = said(capsys, *command, folder / "iris", tmp_path / "none.csv", status=1)
        assert line == "pyroflows: expected at least one row in none.csv; got none\n"


def test_an_unknown_category_is_refused_by_name(capsys, folder, tmp_path):
    frame = pd.read_csv(folder / "iris.csv")
    frame.loc[7, "species"] = "rose"
    frame.to_csv(tmp_path / "x.csv", index=False)
    line = said(capsys, "score", folder / "given", tmp_path / "x.csv", status=1)
    assert "'setosa', 'versicolor', 'virginica' in column 'species' of x.csv; got 'rose' in row 8 (line 9)" in line
    line = said(capsys, "sample", folder / "given", "-o", tmp_path / "y.csv", "--given", "species=rose", status=1)
    assert "got 'rose'" in line
    line = said(capsys, "fit", folder / "iris.csv", "-o", tmp_path / "m", "--given", "species", status=1)
    assert "expected numbers in column 'species' of iris.csv; got 'setosa' in row 1 (line 2)" in line


@pytest.mark.slow
def test_a_million_rows(capsys, tmp_path):
    x = np.random.default_rng(0).standard_normal((1_000_000, 4)).astype(np.float32)
    x[:, 1] += x[:, 0] ** 2
    write_table(tmp_path / "x.csv", "abcd", np.array_split(x, 10))
    arguments = ["fit", tmp_path / "x.csv", "-o", tmp_path / "m", "--flow", "realnvp", "--minutes", 0.5]
    found = said_in_json(capsys, *arguments, "--epochs", 1)
    assert found["rows"] == 1_000_000
    assert found["best_loss"] < 5.9  # the entropy is 5.676
    found = said_in_json(capsys, "score", tmp_path / "m", tmp_path / "x.csv", "-o", tmp_path / "scores.parquet")
    assert found["rows"] == 1_000_000
    with (tmp_path / "x.csv").open("a") as file:
        file.write("1,2,oops,4\n")
    line = said(capsys, *arguments, status=1)
    assert "expected numbers in column 'c' of x.csv; got 'oops' in row 1000001 (line 1000002)" in line


# Exit statuses, pipes and interrupts


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["fit", "x.csv"], "the following arguments are required: --output/-o"),
        (
            ["fit", "x.csv", "-o", "m", "--columns", "a,b", "--given", "b"],
            "expected each column in --columns or in --given; got b in both",
        ),
        (["fit", "x.csv", "-o", "m", "--columns", "a,,b"], "expected different names separated by commas"),
        (["fit", "x.csv", "-o", "m", "--categories", "b"], "expected --categories among the columns of --given"),
        (["fit", "x.csv", "-o", "-", "--json"], "--json cannot be combined with --output -"),
        (["fit", "x.csv", "-o", "m", "--flow", "mfa"], "invalid choice: 'mfa'"),
        (["fit", "x.csv", "-o", "m", "--epochs", "0"], "expected a positive integer; got '0'"),
        (["fit", "x.csv", "-o", "m", "--minutes", "nan"], "expected a positive number; got 'nan'"),
        (["fit", "x.csv", "-o", "m", "--validation", "1"], "expected a number from 0 to 1, without 1; got '1'"),
        (["fit", "x.csv", "-o", "m", "--set", "3=x"], "expected NAME=VALUE; got '3=x'"),
        (["score", "-", "-"], "MODEL - cannot be combined with DATA -"),
        (["score", "m", "x.csv", "--json", "-o", "-"], "--json, --output - and --pass-model cannot be combined"),
        (["sample", "m", "-o", "x.csv", "-n", "-1"], "expected a positive integer"),
        (["sample", "-", "-o", "x.csv", "--given", "-"], "MODEL - cannot be combined with --given -"),
        (["sample", "m", "-o", "-", "--json"], "--json cannot be combined with --output -"),
        (["plot", "m", "x.csv", "-o", "x.txt"], "expected --output that ends in .png, .pdf or .svg; got x.txt"),
    ],
)
def test_wrong_use_is_status_2_and_one_line(capsys, arguments, line):
    found = said(capsys, *arguments, status=2)
    assert found.startswith(f"pyroflows {arguments[0]}: ")
    assert line in found


def test_options_that_the_flow_does_not_take_are_wrong_use(capsys, folder, tmp_path):
    for flow in ("maf", "realnvp"):
        arguments = ["fit", folder / "diabetes.csv", "-o", tmp_path / "m", "--flow", flow, "--set", "bins=3"]
        assert "bins" in said(capsys, *arguments, status=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(capsys, folder, tmp_path):
    for arguments in (["fit", folder / "iris.csv", "-o", tmp_path / "m"], ["score", folder / "iris", "x.csv"]):
        assert "expected a device that torch sees; got 'cuda'" in said(capsys, *arguments, "--device", "cuda", status=1)


def test_truth_is_given_as_a_table_writes_it(capsys, tmp_path):
    ones = np.arange(40) % 3 == 0
    pd.DataFrame({"a": np.arange(40) / 7, "flag": ones}).to_csv(tmp_path / "x.csv", index=False)
    said(capsys, "fit", tmp_path / "x.csv", "-o", tmp_path / "m", "--given", "flag", *SMALL)
    drawn = [
        said(capsys, "sample", tmp_path / "m", "--given", f"flag={flag}", "-o", "-", "--seed", "1")
        for flag in ("True", "1", "false", "0")
    ]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_failures_are_status_1_and_one_line(capsys, folder, tmp_path):
    data, model, out = folder / "iris.csv", folder / "iris", tmp_path / "x.csv"
    (tmp_path / "text.csv").write_text("hello")
    (tmp_path / "half.csv").write_text("age,bmi,bp,target\n3,1,1,1\n3.5,1,1,1\n")
    (tmp_path / "semi.csv").write_text("a;b\n1,5;2\n")
    for arguments, line in (
        (["fit", data, "-o", tmp_path / "no" / "m"], "in a folder that can be written to"),
        (["fit", tmp_path / "no.csv", "-o", out], "which does not exist"),
        (["fit", data, "-o", out, "--columns", "petal"], "expected a column 'petal' in iris.csv; got 'sepal_length', "),
        (["fit", data, "-o", out, "--columns", "petal_width", "--integer-columns", "petal_width"], "whole numbers"),
        (["score", data, data], "expected a flow written by save"),
        (["score", model, folder / "diabetes.csv"], "expected a column 'sepal_length' in diabetes.csv; got 'age', "),
        (["score", model, data, "-o", tmp_path / "x.txt"], "expected a table that ends in .csv"),
        (["sample", model, "-o", out, "--given", "a=1"], "expected no --given for a model that is not conditional"),
        (["sample", folder / "given", "-o", out], "expected --given with species"),
        (["sample", folder / "whole", "-o", out, "--given", "target=x"], "expected a number as target; got 'x'"),
        (
            ["sample", folder / "whole", "-o", out, "--given", "age=1"],
            "expected --given with a value of each of target",
        ),
        (["fit", data, "-o", out], "in row 1 (line 2): --columns leaves it out, --given with --categories 'species'"),
        (["fit", data, "-o", out, "--given", "species"], "in row 1 (line 2): --categories 'species' takes labels"),
        (
            ["score", folder / "whole", tmp_path / "half.csv"],
            "expected whole numbers in column 'age' of half.csv; got 3.5 in row 2 (line 3)",
        ),
        (["fit", tmp_path / "semi.csv", "-o", out], "expected commas between the cells of semi.csv; got a first line"),
        (["info", tmp_path / "text.csv"], "expected a flow written by save"),
        (["bench", "--flows", "mfa"], "expected a flow to be one of"),
    ):
        found = said(capsys, *arguments, status=1)
        assert found.startswith("pyroflows: ")
        assert line in found
    assert sorted(os.listdir(tmp_path)) == ["half.csv", "semi.csv", "text.csv"]


def test_models_and_tables_go_through_standard_input_and_output(folder, monkeypatch, capsys):
    def through(data, *arguments):
        streams = Stream(data), Stream()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", streams[0])
            patch.setattr(sys, "stdout", streams[1])
            assert main([str(argument) for argument in arguments]) == 0
        return streams[1].buffer.getvalue() or streams[1].getvalue().encode()

    data = (folder / "diabetes.csv").read_bytes()
    model = through(data, "fit", "-", "-o", "-", "--columns", "bmi,bp", *SMALL)
    assert "model: -" in capsys.readouterr().err
    assert through(model, "score", "-", folder / "diabetes.csv", "--pass-model") == model
    assert "442 rows" in capsys.readouterr().err
    new = through(model, "sample", "-", "-n", 30, "-o", "-")
    assert new.startswith(b"bmi,bp\n")
    assert new.count(b"\n") == 31
    (folder / "passed").write_bytes(model)
    scores = through(new, "score", folder / "passed", "-", "-o", "-")
    assert scores.startswith(b"log_prob\n")
    assert scores.count(b"\n") == 31
    assert json.loads(through(model, "info", "-", "--json"))["notes"]["data"] == "standard input"


def test_what_ends_a_pipe_early_is_no_error(folder):
    run = f"{sys.executable} -m pyroflows"
    done = subprocess.run(
        ["bash", "-c", f"{run} sample {folder}/iris -n 300000 --output - --quiet | head -n 3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith("sepal_length,sepal_width,petal_length,petal_width\n")
    assert done.stdout.count("\n") == 3
    assert done.stderr == ""


@pytest.mark.slow
def test_a_pipe_of_three_commands(folder, tmp_path):
    run = f"{sys.executable} -m pyroflows"
    command = (
        f"{run} fit {folder}/diabetes.csv --output - --columns bmi,bp {' '.join(SMALL)} --quiet "
        f"| {run} score - {folder}/diabetes.csv --output {tmp_path}/scores.csv --pass-model "
        f"| {run} sample - -n 1000 --output -"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("bmi,bp\n")
    assert done.stdout.count("\n") == 1001
    assert done.stderr.startswith("mean log-density ")
    assert done.stderr.count("\n") == 1
    assert len(open_table(tmp_path / "scores.csv").read()) == 442


@pytest.mark.slow
def test_two_processes_write_what_one_writes(folder, tmp_path):
    data = tmp_path / "data.parquet"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    for name, run in (("one", [sys.executable, "-m"]), ("two", torchrun)):
        for command in (
            ["sample", f"{folder}/whole", "-n", "200000", "--given", "target=120", "--seed", "1", "-o", str(data)],
            ["score", f"{folder}/whole", str(data), "-o", f"{tmp_path}/{name}.npy"],
        ):
            done = subprocess.run(
                [*run, "pyroflows", *command],
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # as torchrun has it: other numbers of threads round apart
                capture_output=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        data.rename(tmp_path / f"{name}.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


@pytest.mark.parametrize("name", ["nsf", "auto"])
def test_ctrl_c_leaves_the_best_model_so_far(folder, tmp_path, name):
    model = tmp_path / "model"
    code = "import sys; from pyroflows.cli import main, output; output._SECONDS = 0.5; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fit", f"{folder}/diabetes.csv", "--output", str(model)]
    command += ["--columns", "bmi,bp", "--num-layers", "2", "--epochs", "1000000", "--patience", "1000000"]
    command += ["--flow", name]
    fit = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert fit.stdout.readline().startswith(f"{name} of 2 columns")
    while not fit.stderr.readline().startswith("fit: step "):  # it trains
        assert fit.poll() is None
    fit.send_signal(signal.SIGINT)
    _, err = fit.communicate(timeout=60)
    assert fit.returncode == 1
    assert err.splitlines()[-1] == f"pyroflows: interrupted: the best model so far is in {model}"
    flow = load(model)
    assert flow.notes["stopped"] == "interrupted"
    x = torch.from_numpy(open_table(folder / "diabetes.csv", ["bmi", "bp"]).read()).float()
    assert (
        flow.log_prob(x).mean() > torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean() - 0.1
    )


def test_a_log_has_a_line_now_and_then(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pyroflows.cli.output._SECONDS", 0.0)
    arguments = ["fit", f"{folder}/diabetes.csv", "-o", f"{tmp_path}/m", "--columns", "bmi,bp", *SMALL]
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("fit: step ") and line.endswith(" nats") for line in lines)
    assert main(["score", f"{tmp_path}/m", f"{folder}/diabetes.csv"]) == 0
    assert capsys.readouterr().err.startswith("scored 442 rows, ")


# Texts


def test_minutes_end_in_the_words_of_the_command_line(capsys, folder, tmp_path):
    arguments = ["fit", folder / "diabetes.csv", "-o", tmp_path / "m", "--minutes", 0.005, *SMALL[:4]]
    arguments += ["--epochs", 100_000]
    assert "--minutes 0.005 reached" in said(capsys, *arguments)


def test_the_same_seed_gives_the_same_file(capsys, folder, tmp_path):
    files = [tmp_path / name for name in ("first", "second")]
    for file in files:
        said(capsys, "fit", folder / "diabetes.csv", "-o", file, "--epochs", 2, "--seed", 3, *SMALL)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_unknown_option_of_a_flow_is_answered_by_those_that_there_are(capsys, folder, tmp_path):
    arguments = ["fit", folder / "diabetes.csv", "-o", tmp_path / "m", "--set", "bins=8"]
    assert "num_layers and hidden_features as options of 'auto'; got 'bins'" in said(capsys, *arguments, status=2)
    text = said(capsys, *arguments, "--flow", "nsf", status=2)
    assert "num_bins, bound" in text
    assert "hidden_features" in text
    assert "got 'bins': perhaps 'num_bins'" in text


def test_a_table_that_is_not_there_is_named(capsys, folder, tmp_path):
    text = said(capsys, "fit", folder / "diabtes.csv", "-o", tmp_path / "m", status=1)
    assert f"expected the file of a table; got {folder / 'diabtes.csv'}, which does not exist: perhaps" in text
    assert "diabetes.csv" in text


def test_the_first_ragged_row_is_named(capsys, tmp_path):
    lines = ["x,y", *["1,2"] * 10, "1", *["1,2"] * 10, "1,2,3", "1,2"]
    (tmp_path / "ragged.csv").write_text("\n".join(lines))
    text = said(capsys, "fit", tmp_path / "ragged.csv", "-o", tmp_path / "m", status=1)
    assert "row 11 (line 12)" in text


def test_a_label_with_a_comma_is_given():
    names = ["kind", "size"]
    assert _values("kind=a,b,size=3", names) == {"kind": "a,b", "size": "3"}
    assert _values('kind="a,b", size=3', names) == {"kind": "a,b", "size": "3"}
    assert _values("size=3,kind=x=y,z", names) == {"size": "3", "kind": "x=y,z"}
