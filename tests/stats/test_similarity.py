"""Similarities from a file: both shapes give what they say, every other shape is refused by name. That the
partial correlation takes them out is in test_stats_accuracy.py, on a whole run."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from leakfast.errors import InputError
from leakfast.stats import similarity


def test_vectors_give_their_cosine(tmp_path):
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"persona": ["a", "b", "c"], **{f"d{k}": rng.normal(size=3) for k in range(4)}})
    for file in (tmp_path / "v.csv", tmp_path / "v.parquet"):
        table.write_csv(file) if file.suffix == ".csv" else table.write_parquet(file)
        found = {(s, p): v for s, p, v in similarity.read(file).rows()}
        one, other = (table.select(pl.exclude("persona")).to_numpy()[i] for i in (0, 2))
        told = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert found["a", "c"] == found["c", "a"] == pytest.approx(told, abs=1e-12)
        assert len(found) == 9


def test_pairs_are_taken_as_they_are(tmp_path):
    table = pl.DataFrame({"persona": ["a"], "similarity": [0.25], "source": ["s"]})
    table.write_csv(tmp_path / "p.csv")
    assert similarity.read(tmp_path / "p.csv").rows() == [("s", "a", 0.25)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("name,d0\na,1\n", "has the columns name, d0"),
        ("source,persona,similarity,more\ns,a,1,2\n", "has the columns"),
        ("persona,similarity\na,1\n", "has the columns"),
        ("persona,d0\na,x\n", "column d0 holds String"),
        ("persona\na\n", "no number column"),
        ("persona,d0\na,1\nb,\n", "row 2 holds an empty cell"),
        ("persona,d0\na,1\na,2\n", "a stands twice"),
        ("persona,d0\na,0\n", "the vector of a has length 0"),
        ("source,persona,similarity\ns,a,inf\n", "no finite number"),
        ("source,persona,similarity\ns,a,1\ns,a,2\n", "s, a stands twice"),
    ],
)
def test_other_shapes_are_refused(tmp_path, text, wanted):
    file = tmp_path / "e.csv"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        similarity.read(file)
    assert wanted in error.value.message and str(file) in error.value.message


def test_other_files_are_refused(tmp_path):
    (tmp_path / "e.npy").write_bytes(b"x")
    (tmp_path / "e.parquet").write_bytes(b"no parquet")
    for name, wanted in (("e.npy", "ends in .npy"), ("e.parquet", "cannot be read"), ("none.csv", "no file")):
        with pytest.raises(InputError, match=wanted):
            similarity.read(tmp_path / name)
