"""Two evaluations of the same rows: the comparison itself, and what is read for it from the record."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from actial_fast.data.sources.row import Row, Turn
from actial_fast.evaluation.evaluate import _record
from actial_fast.evaluation.statistics import Record, accuracy_table
from actial_fast.report.paired import compare, paired


def test_what_is_compared_is_told_exactly():
    a, b = [1.0] * 6 + [0.0] * 4, [0.0] * 1 + [1.0] * 8 + [0.0]
    told = compare(a, b, list(range(10)))
    assert (told.n, told.clusters, told.only_first, told.only_second) == (10, 10, 1, 3)
    assert told.difference == pytest.approx(0.2) and told.mcnemar == binomtest(1, 4).pvalue == 0.625
    assert told.low < 0.2 < told.high and told == compare(a, b, list(range(10))), "the same numbers every time"
    back = compare(b, a, list(range(10)))
    assert (
        back.difference == pytest.approx(-0.2)
        and back.mcnemar == told.mcnemar
        and back.by_clusters == pytest.approx(told.by_clusters, abs=0.05)
    )


def test_clusters_take_away_what_mcnemar_makes_too_much_of():
    """Ten pairs of three questions, eight of them better: for items 24 against 6, for pairs 8 against 2."""
    a, b = np.repeat([0.0] * 8 + [1.0] * 2, 3).tolist(), np.repeat([1.0] * 8 + [0.0] * 2, 3).tolist()
    told = compare(a, b, np.repeat(range(10), 3).tolist())
    assert told.mcnemar == pytest.approx(binomtest(6, 30).pvalue) and told.mcnemar < 0.002
    assert told.by_clusters == pytest.approx(binomtest(2, 10).pvalue, abs=0.02) and told.by_clusters > 0.05
    assert told.high - told.low > 0.7


def test_scores_in_between_have_no_mcnemar_and_equal_models_no_difference():
    told = compare([0.5, 1.0, 0.0], [1.0, 1.0, 0.2], [0, 1, 2])
    assert told.mcnemar is None and told.difference == pytest.approx(0.7 / 3)
    same = compare([1.0, 0.0], [1.0, 0.0], [0, 1])
    assert (same.difference, same.low, same.high, same.mcnemar, same.by_clusters) == (0, 0, 0, 1, 1)
    one = compare([1.0, 1.0], [0.0, 0.0], [7, 7])
    assert (one.clusters, one.by_clusters) == (1, 1.0)


@pytest.mark.parametrize(("first", "second", "match"), [([1.0], [1.0, 0.0], "items that both answered"), ([], [], "no item in common")])
def test_other_items_are_refused(first, second, match):
    with pytest.raises(ValueError, match=match):
        compare(first, second, [0] * len(first))


def table(outcomes, kinds="ab", size=1, rows=None, marks=None):
    """As read back from a record. outcomes: 0, 1 (right), 2 (well-formed) or 3 of each row; `size` rows in a row show one picture."""
    rows = range(len(outcomes)) if rows is None else rows
    pictures = [(f"picture {k // size}",) for k in rows]
    said = zip(rows, outcomes, pictures, marks or [None] * len(outcomes), strict=True)
    records = [Record(kinds[k % len(kinds)], bool(o & 1), bool(o & 2), 1, "x", 2, shown, mark, f"row{k:05d}") for k, o, shown, mark in said]
    return json.loads(json.dumps(accuracy_table(records)))


def test_rows_are_paired_whatever_their_order():
    before, after = [0, 1, 3, 3, 0, 1], [3, 1, 0, 3, 3, 3]
    order = [4, 2, 0, 5, 1, 3]
    told = paired(table(before), table([after[k] for k in order], rows=order))
    assert told == paired(table(before), table(after))
    assert (told.n, told.only_first, told.only_second) == (6, 1, 2) and told.difference == pytest.approx(1 / 6)
    formed = paired(table(before), table(after), "well_formed_and_correct")
    assert (formed.only_first, formed.only_second) == (1, 3)
    assert paired(table(before), table(after), kind="b").n == 3 and paired(table(before), table(after), kind="c") is None


def test_only_what_both_had_is_compared_and_clusters_are_joined():
    first, second = table([3] * 12, size=3), table([0] * 8, size=2, rows=range(4, 12))
    told = paired(first, second)
    assert (told.n, told.difference) == (8, -1)
    assert told.clusters == 2, "4 and 5 by both; from 6 to 11 a chain, of three by the first and of two by the second"
    assert paired(first, table([3], rows=[99])) is None
    without = accuracy_table([Record("a", True, True, 1, "x", 2)])
    assert "rows" not in without and paired(first, without) is None and paired(without, first) is None


def test_rows_that_are_alike_are_as_many_as_they_are():
    first, second = table([3, 3, 0], rows=[7, 7, 7]), table([3, 0], rows=[7, 7])
    assert paired(first, second).n == 2


def test_marks_are_kept_where_they_say_more():
    first, second = table([3, 0], marks=[1.0, 0.25]), table([3, 0], marks=[1.0, 0.75])
    assert paired(first, second, "score").difference == pytest.approx(0.25) and paired(first, second).difference == 0
    assert "marks" not in table([3, 0])["rows"] and paired(table([3, 0]), table([3, 3]), "score").difference == 0.5


def test_a_record_knows_its_row_wherever_it_lies(tmp_path):
    def key(folder, content, *, question="<image>Which?", truth="B", system=()):
        path = tmp_path / folder / "a.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        turns = (*(Turn("system", text) for text in system), Turn("user", question), Turn("assistant", "B"))
        return _record(Row(turns, (path,), truth), "B", 1, False).row

    same = key("one", b"12")
    assert same == key("two", b"34") == key("one", b"12", system=["Think."]) and len(same) == 8
    others = [key("one", b"123"), key("one", b"12", question="<image>Who?"), key("one", b"12", truth="A")]
    assert len({same, *others}) == 4
    encoded = [_record(Row((Turn("user", "<image>?"),), (picture,), "B"), "B", 1, False).row for picture in (b"1", b"2")]
    lost = _record(Row((Turn("user", "<image>?"),), (Path("gone.png"),), "B"), "B", 1, False).row
    assert len({*encoded, lost}) == 3
