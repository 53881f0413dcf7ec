"""Tables in files: what is written is read, in chunks, and what is no number is refused by row and column."""

from __future__ import annotations

import os
import pickle
import re
import sys
import zipfile
from random import Random

import numpy as np
import pandas as pd
import pytest
from datasets import Stream

from pyroflows.data import open_table, write_table

ENDINGS = ("csv", "parquet", "npy", "npz")


def table(seed=0, rows=1000):
    x = np.random.default_rng(seed).standard_normal((rows, 3))
    x[:, 0] = np.arange(rows) - 5
    return x


def chunks(x, rows=300):
    return (x[start : start + rows] for start in range(0, len(x), rows))


def csv(folder, text, name="data.csv"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


# What is written is read


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_written_is_read(tmp_path, ending, dtype):
    x, path = table().astype(dtype), tmp_path / f"x.{ending}"
    assert write_table(path, ["n", "a", "b"], chunks(x), integers=["n"]) == 1000
    found = open_table(path)
    names = ["n", "a", "b"] if ending in ("csv", "parquet") else ["0", "1", "2"]
    assert found.columns == names
    assert found.named == (names[0] == "n")
    assert found.num_rows == (None if ending == "csv" else 1000)
    parts = list(found.chunks(400))
    assert [len(part) for part in parts] == [400, 400, 200]
    assert np.array_equal(np.concatenate(parts).astype(dtype), x)
    assert np.array_equal(open_table(path, names[2:0:-1]).read().astype(dtype), x[:, [2, 1]])
    assert os.listdir(tmp_path) == [path.name]


def test_other_libraries_read_what_is_written(tmp_path):
    x = table()
    for ending in ENDINGS:
        write_table(tmp_path / f"x.{ending}", ["n", "a", "b"], chunks(x), integers=["n"])
    assert list(pd.read_csv(tmp_path / "x.csv").columns) == ["n", "a", "b"]
    assert np.array_equal(np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1), x)
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert frame["n"].dtype == np.int64
    assert np.array_equal(frame.to_numpy(), x)
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)
    assert np.array_equal(np.load(tmp_path / "x.npz")["data"], x)


def test_labels_are_written_and_found_again(tmp_path):
    x = np.array([[0.5, 1.0], [1.5, 0.0], [2.5, 1.0]])
    for ending in ("csv", "parquet"):
        path = tmp_path / f"x.{ending}"
        write_table(path, ["a", "kind"], [x], categories={"kind": ["cat", 'a "dog", wet']})
        found = open_table(path, categories={"kind": None})
        assert np.array_equal(found.read()[:, 1], [0.0, 1.0, 0.0])
        assert found.categories == {"kind": ['a "dog", wet', "cat"]}
        again = open_table(path, ["kind"], {"kind": ["cat", 'a "dog", wet']})
        assert np.array_equal(again.read()[:, 0], x[:, 1])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_without_rows_is_written_and_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    assert write_table(path, ["a", "b"], []) == 0
    with pytest.raises(ValueError, match=r"^expected at least one row in x\.\w+(:data)?; got none$"):
        open_table(path).read()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_write_that_fails_leaves_the_last_file(tmp_path, ending):
    def failing():
        yield table()
        raise RuntimeError("no more")

    path = tmp_path / f"x.{ending}"
    write_table(path, ["a", "b", "c"], [table()])
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no more"):
        write_table(path, ["a", "b", "c"], failing())
    with pytest.raises(ValueError, match=r"expected chunks of shape \(rows, 2\); got \(1000, 3\)"):
        write_table(path, ["a", "b"], [table()])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_standard_input_and_output(monkeypatch):
    out = Stream()
    monkeypatch.setattr(sys, "stdout", out)
    write_table("-", ["a,b", "c"], [np.array([[1.5, 2.0]]), np.array([[0.1, 3.0]])], integers=["c"])
    assert out.buffer.getvalue() == b'"a,b",c\n1.5,2\n0.1,3\n'
    monkeypatch.setattr(sys, "stdin", Stream(out.buffer.getvalue()))
    assert np.array_equal(open_table("-", ["c", "a,b"]).read(), [[2, 1.5], [3, 0.1]])


# What files there are


def test_csv_as_others_write_it(tmp_path):
    text = '\ufeffa,"b ""x""",c\r\n 1 ,"multi\r\nline",True\r\n\r\n-2.5,y,False\r\n'
    assert np.array_equal(open_table(csv(tmp_path, text), ["a", "c"]).read(), [[1, 1], [-2.5, 0]])
    path = csv(tmp_path, ",a\n0,5\n1,6\n")  # an index, as pandas writes it
    assert np.array_equal(open_table(path, ["a"]).read(), [[5], [6]])
    with pytest.raises(ValueError, match=r"expected a name for each column of data.csv; got none for column 1"):
        open_table(path).read()


def test_parquet_of_many_types(tmp_path):
    frame = pd.DataFrame(
        {"i": [1, 2], "b": [True, False], "f": np.float32([0.5, 1.5]), "k": pd.Categorical(["x", "y"]), "t": "text"}
    )
    frame.to_parquet(tmp_path / "x.parquet", row_group_size=1)
    assert np.array_equal(open_table(tmp_path / "x.parquet", ["f", "i", "b"]).read(), [[0.5, 1, 1], [1.5, 2, 0]])
    assert np.array_equal(open_table(tmp_path / "x.parquet", ["k"], {"k": ["y", "x"]}).read(), [[1], [0]])


def test_arrays_of_many_kinds(tmp_path):
    x = table()
    path = tmp_path / "x.npy"
    for array in (x.astype(">f8"), np.asfortranarray(x), x):
        np.save(path, array)
        assert np.array_equal(np.concatenate(list(open_table(path).chunks(70))), x)
    np.save(path, x[:, 0].astype(np.int32))
    assert np.array_equal(open_table(path).read(), x[:, :1])
    np.save(path, np.array([(1, 0.5), (2, 1.5)], dtype=[("n", "i4"), ("a", "f4")]))
    assert np.array_equal(open_table(path, ["a"]).read(), [[0.5], [1.5]])
    path = tmp_path / "x.npz"
    for saved in (np.savez, np.savez_compressed):
        saved(path, x=x, y=np.asfortranarray(x))
        for name in "xy":
            assert np.array_equal(np.concatenate(list(open_table(f"{path}:{name}").chunks(70))), x)
    with pytest.raises(ValueError, match=r"expected one array in x.npz, or its name, as in x.npz:name; got x, y"):
        open_table(path)


# What is refused

NUMBERS = "a,b\n" + "1,2\n" * 3


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "expected a first line of column names in data.csv; got none"),
        ("1.5,2\n3,4\n", "expected a first line of column names in data.csv; got numbers: 1.5, 2"),
        ("a,a\n1,2\n", "expected columns of different names in data.csv; got 'a' 2 times"),
        ("a,b\n", "expected at least one row in data.csv; got none"),
        (NUMBERS + "1,\n", "expected numbers in column 'b' of data.csv; got a missing value in row 4 (line 5)"),
        (NUMBERS + "1\n", "expected numbers in column 'b' of data.csv; got a missing value in row 4 (line 5)"),
        (NUMBERS + "\nNA,2\n", "expected numbers in column 'a' of data.csv; got a missing value in row 4 (line 6)"),
        (NUMBERS + "x y,2\n", "expected numbers in column 'a' of data.csv; got 'x y' in row 4 (line 5)"),
        (NUMBERS + "1,-inf\n", "expected numbers in column 'b' of data.csv; got -inf in row 4 (line 5)"),
        ('a,b\n1,"x\n\ny"\n', r"expected numbers in column 'b' of data.csv; got 'x\n\ny' in row 1 (line 4)"),
        ("a,b\n1,9007199254740993\n", "9007199254740993, which a float64 does not hold exactly, in row 1 (line 2)"),
        ("a,b\n1,2,3\n", "expected 2 cells in each row of data.csv, as in its first line; got 3 in row 1 (line 2)"),
        (
            NUMBERS + "1,2,3\n",
            "expected 2 cells in each row of data.csv, as in its first line; got 3 in row 4 (line 5)",
        ),
        ("a\n1\n\n2\n", "expected numbers in column 'a' of data.csv; got a missing value in row 2 (line 3)"),
        ('a,b\n1,"2\n', "expected a CSV file in UTF-8; got data.csv, which is not a valid one"),
    ],
)
@pytest.mark.parametrize("rows", [2, 65536])
def test_csv_is_refused_by_row_and_column(tmp_path, text, said, rows):
    with pytest.raises(ValueError) as error:
        list(open_table(csv(tmp_path, text)).chunks(rows))
    assert said in " ".join(str(error.value).split())
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"a,b\n1,\xff\xfe\n")
    with pytest.raises(ValueError, match="expected a CSV file in UTF-8; got data.csv, which is not a valid one"):
        open_table(path).read()


def test_cells_of_standard_input_are_refused_by_row(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stream(b"a,b\n1,2\n1,x\n"))
    with pytest.raises(ValueError, match="expected numbers in column 'b' of standard input; got 'x' in row 2$"):
        open_table("-").read()
    monkeypatch.setattr(sys, "stdin", Stream(b"a,b\n1,2\n1,2,3\n"))
    with pytest.raises(ValueError, match="expected 2 cells in each row of standard input.*; got 3 in row 2$"):
        open_table("-").read()


@pytest.mark.parametrize("bad, got", [(np.nan, "a missing value"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("ending", ["parquet", "npy", "npz"])
def test_arrays_and_parquet_are_refused_by_row_and_column(tmp_path, ending, bad, got):
    x = table()
    x[777, 1] = bad
    path = tmp_path / f"x.{ending}"
    write_table(path, ["0", "1", "2"], [x])
    with pytest.raises(ValueError, match=rf"^expected numbers in column '1' of x\.\w+(:data)?; got {got} in row 778$"):
        list(open_table(path).chunks(100))
    assert len(open_table(path, ["0", "2"]).read()) == 1000


@pytest.mark.parametrize("values", [["x", "y"], pd.to_datetime(["2020-01-01", "2021-01-01"]), [[1, 2], [2, 3]]])
def test_columns_of_parquet_that_hold_no_numbers_are_refused(tmp_path, values):
    pd.DataFrame({"a": [1.0, 2.0], "b": values}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"^expected numbers in column 'b' of x.parquet; got '.*' in row 1$"):
        open_table(tmp_path / "x.parquet").read()
    assert len(open_table(tmp_path / "x.parquet", ["a"]).read()) == 2


def test_unknown_and_missing_labels_are_refused(tmp_path):
    path = csv(tmp_path, "kind,a\ncat,1\ndog,2\n,3\n")
    with pytest.raises(
        ValueError, match=r"^expected one of the categories 'cat', 'cow' in column 'kind' of data.csv; "
    ):
        open_table(path, categories={"kind": ["cat", "cow"]}).read()
    with pytest.raises(ValueError, match=r"expected labels in column 'kind' of data.csv; got a missing value in row 3"):
        open_table(path, categories={"kind": None}).read()
    path = csv(tmp_path, "kind\n" + "\n".join(map(str, range(1500))))
    with pytest.raises(ValueError, match="expected at most 1000 categories in column 'kind' of data.csv; got more"):
        open_table(path, categories={"kind": None}).read()


def test_numbers_are_the_same_labels_in_every_format(tmp_path):
    for ending in ("csv", "parquet"):
        frame = pd.DataFrame({"kind": [3, 1, 3]})
        frame.to_csv(tmp_path / "x.csv", index=False)
        frame.astype(float).to_parquet(tmp_path / "x.parquet")
        found = open_table(tmp_path / f"x.{ending}", categories={"kind": ["1", "3"]})
        assert np.array_equal(found.read(), [[1], [0], [1]])


@pytest.mark.parametrize(
    "name, said",
    [
        ("x.txt", "expected a table that ends in .csv, .parquet, .npy, .npz, or '-' for CSV; got"),
        ("x.parquet", "expected a Parquet file; got x.parquet, which is not a valid one"),
        ("x.npy", "expected an array of numbers in an NPY file; got x.npy, which is not a valid one"),
        ("x.npz", "expected an array of numbers in an NPZ file; got x.npz, which is not a valid one"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"hello, world"])
def test_files_that_are_something_else_are_refused(tmp_path, name, said, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        open_table(tmp_path / name)


@pytest.mark.parametrize("ending", ["parquet", "npy", "npz"])
def test_files_that_are_cut_short_are_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    write_table(path, ["0", "1", "2"], chunks(table()))
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^expected .*; got x\.") as error:
            open_table(path).read()
        assert "\n" not in str(error.value)


def spoiled(whole, random):
    """Change, take out or put in a few bytes, more often near the ends, where headers and indices are."""
    changed = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        places = (random.randrange(130), random.randrange(len(changed)), len(changed) - 1 - random.randrange(700))
        place = max(0, min(random.choice(places), len(changed) - 1))
        changed[place : place + random.randrange(6)] = random.randbytes(random.randrange(6))
    return bytes(changed)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("times", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_spoiled_files_are_read_or_refused_in_one_sentence(tmp_path, ending, times):
    path = tmp_path / f"x.{ending}"
    write_table(path, ["n", "a", "b"], chunks(table(rows=60), 30), integers=["n"])
    whole, random, refused = path.read_bytes(), Random(times), []
    for _ in range(times):
        path.write_bytes(spoiled(whole, random))
        try:
            assert all(np.isfinite(part).all() for part in open_table(path).chunks(25))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > times / 4
    assert all(line.startswith("expected ") and "\n" not in line for line in refused)


def test_shapes_and_columns_that_are_none_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    for array in (np.zeros((3, 2, 2)), np.float64(3), np.zeros((3, 0))):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"expected an array of shape \(rows, columns\) in x.npy; got \("):
            open_table(path)
    with pytest.raises(ValueError, match=r"expected a column 'z' in data.csv; got 'a', 'b'"):
        open_table(csv(tmp_path, NUMBERS), ["z"])
    with pytest.raises(ValueError, match=r"expected a column 'z' in data.csv; got 'a', 'b'"):
        open_table(csv(tmp_path, NUMBERS), categories={"z": None})
    with pytest.raises(FileNotFoundError, match="no.csv"):
        open_table(tmp_path / "no.csv")


class Payload:
    """What makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_ever_unpickled(tmp_path):
    made = tmp_path / "made"
    objects = np.array([Payload(made)], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=objects)
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Payload(made)))
    (tmp_path / "z.npz").write_bytes(pickle.dumps(Payload(made)))
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Payload(made)))
    for name in ("x.npy", "x.npz", "y.npy", "y.npz", "z.npz"):
        with pytest.raises(ValueError, match="^expected an array of numbers in "):
            open_table(tmp_path / name).read()
    assert not made.exists()
    pickle.loads(pickle.dumps(Payload(made))).close()
    assert made.exists()  # so would it have been
