"""Tab-separated tables: cells with everything in them, offsets, and what is broken."""

import csv
import random

import pytest

from actial_fast.data.sources.reader import open_records
from actial_fast.data.sources.row import BadRow

CELLS = [
    "",
    "plain",
    "two\nlines",
    "a\ttab",
    'a "quote"',
    "carriage\r\nreturn",
    "nan",
    "\u00e4\u6587\u2028line",
    "[1, 2",
    "['a', 'b']",
    '["c"]',
    "x" * 300_000,
]


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ","), ("A.TSV", "\t")])
def test_cells_come_back_as_they_were_written(tmp_path, name, delimiter):
    draw = random.Random(0)
    rows = [[draw.choice(CELLS) for _ in range(3)] for _ in range(60)]
    with open(tmp_path / name, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([["index", "question", "answer"], *rows])
    records = open_records(tmp_path / name)
    assert len(records) == 60 and list(records.column_names) == ["index", "question", "answer"]
    lists = {"['a', 'b']": ["a", "b"], '["c"]': ["c"]}
    for n in draw.sample(range(60), 60):
        assert list(records[n].values()) == [lists.get(cell, cell) for cell in rows[n]]
        assert records.some(n, ["answer", "none"]) == {"answer": records[n]["answer"]}
    assert records.where(4) == f"{tmp_path / name}:5"


def test_marks_blank_lines_and_ends(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf\"index\"\timage\r\n\r\n1\ta.png\r\n\r\n\r\n2\t['a.png', 'b.png']")
    records = open_records(tmp_path / "a.tsv")
    assert [records[n] for n in range(len(records))] == [{"index": "1", "image": "a.png"}, {"index": "2", "image": ["a.png", "b.png"]}]
    assert records.identity(1, ["images", "image"]) == ("a.png", "b.png")
    assert records.pictures(0, ["image"]) == (str(tmp_path / "a.png"),)


def test_a_bad_row_costs_that_row(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a\tb\n1\t2\n1\n1\t2\t3\n\xff\t2\n3\t4\n")
    records = open_records(tmp_path / "a.tsv")
    assert records[0] == {"a": "1", "b": "2"} and records[4] == {"a": "3", "b": "4"}
    for n, reason in ((1, "1 cells, but the header names 2 columns"), (2, "3 cells"), (3, "not UTF-8")):
        with pytest.raises(BadRow, match=rf"a\.tsv:{n + 1}: {reason}"):
            records[n]


def test_a_header_names_each_column_once(tmp_path):
    for text in ("", "a\ta\n1\t2\n", "\t\n"):
        (tmp_path / "a.tsv").write_text(text)
        with pytest.raises(ValueError, match="the first line must name the columns, each once"):
            open_records(tmp_path / "a.tsv")
