"""Jigsaws: orders and moves as models write them, marks for parts of them, and the board that answers."""

import numpy as np
import pytest

from actial_fast.data.made.jigsaw import exchanged, shuffled, swapped
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.task import Transcript, find_task, prepared
from actial_fast.tasks.jigsaw import Board, parse_move, parse_order, placed, solved, well_played
from tests.conftest import png

PICTURE = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
ORDER = [3, 1, 4, 2, 6, 5]
ROW = Row((Turn("user", "<image>order?"),), (png(shuffled(PICTURE, ORDER, 2, 3)),), meta={"grid": [2, 3], "order": ORDER}, where="f:1")


@pytest.mark.parametrize(
    "answer, order",
    [
        ("2 1 4 3", [2, 1, 4, 3]),
        ("2, 1, 4, 3", [2, 1, 4, 3]),
        ("[2,1,4,3].", [2, 1, 4, 3]),
        ("2-1-4-3", [2, 1, 4, 3]),
        ("2\n1\n4\n3", [2, 1, 4, 3]),
        ("2143", [2, 1, 4, 3]),
        ("2 1 4", None),
        ("2 1 4 4", None),
        ("2 1 4 5", None),
        ("0 1 2 3", None),
        ("2 1 4 3 and so on", None),
        ("21 43", None),
        ("", None),
        ("1" * 5000, None),
        ("99999999999999999999 1 2 3", None),
    ],
)
def test_orders(answer, order):
    assert parse_order(answer, 4) == order


def test_digits_alone_are_no_order_of_more_than_nine():
    assert parse_order("".join(map(str, range(1, 13))), 12) is None
    assert parse_order(" ".join(map(str, range(1, 13))), 12) == list(range(1, 13))


def test_marks_are_the_share_of_places():
    assert placed("<think>1 2</think><answer>3 1 4 2 6 5</answer>", ROW) == 1
    assert placed("<answer>3 1 4 2 5 6</answer>", ROW) == pytest.approx(4 / 6)
    assert placed("314265", ROW) == 1 and placed("I cannot", ROW) == 0 == placed("<answer>3 1 4 2 6 5</answer><answer></answer>", ROW)


@pytest.mark.parametrize(
    "reply, move",
    [
        ("swap 1 3", (1, 3)),
        ("Swap places 1 and 3.", (1, 3)),
        ("swap(1, 3)", (1, 3)),
        ("<think>the sky is below</think><answer>swap 1 with 3</answer>", (1, 3)),
        ("done", "done"),
        ("Done!", "done"),
        ("<answer>done</answer>", "done"),
        ("swap 1 1", None),
        ("swap 0 3", None),
        ("swap 1 7", None),
        ("swap 1 3 and then swap 2 4", None),
        ("swap 1", None),
        ("I would swap 1 3", None),
        ("", None),
    ],
)
def test_moves(reply, move):
    assert parse_move(reply, 6) == move


def test_a_board_answers_with_itself():
    board = Board(ROW)
    first = board.step("swap 1 3")
    second = board.step("<answer>swap 2 3</answer>")
    (image,) = second.images
    assert np.array_equal(image, swapped(swapped(shuffled(PICTURE, ORDER, 2, 3), 1, 3, 2, 3), 2, 3, 2, 3))
    assert first.text.count("<image>") == 1 and board.step("done") is None and board.step("?") is None


def test_playing_it_right_makes_the_picture_whole():
    order, board, replies = list(ORDER), Board(ROW), []
    image = None
    while order != sorted(order):
        place = next(p for p, shown in enumerate(order, 1) if p != shown)
        replies.append(f"swap {place} {order[place - 1]}")
        (image,) = board.step(replies[-1]).images
        order = exchanged(order, place, order[place - 1])
    said = Transcript((*replies, "done"))
    assert np.array_equal(image, PICTURE) and solved(said, ROW) == 1 and well_played(said, ROW)


@pytest.mark.parametrize(
    "replies, marks, formed",
    [
        (("done",), 0, True),
        (("swap 1 3", "done"), 1 / 6, True),
        (("swap 1 3", "what?"), 1 / 6, False),
        (("what?", "swap 1 3"), 0, False),
        (("swap 1 3", "swap 5 6"), 3 / 6, False),
        (("swap 5 6", "done", "swap 5 6"), 2 / 6, False),
    ],
)
def test_an_episode_is_marked_by_its_last_board(replies, marks, formed):
    assert solved(Transcript(replies), ROW) == pytest.approx(marks) and well_played(Transcript(replies), ROW) == formed


@pytest.mark.parametrize(
    "meta, problem",
    [
        ({"order": ORDER}, "needs 'grid'"),
        ({"grid": [2, 3]}, "needs 'order'"),
        ({"grid": [2, 2], "order": ORDER}, "order: the numbers 1 to 4"),
        ({"grid": [0, 3], "order": ORDER}, "grid: two numbers"),
        ({"grid": [2, 3], "order": [1, 1, 2, 3, 4, 5]}, "each once"),
        ({"grid": "2x3", "order": ORDER}, "grid: two numbers"),
    ],
)
@pytest.mark.parametrize("task", ["jigsaw", "jigsaw_turns"])
def test_boards_that_cannot_be_told(meta, problem, task):
    with pytest.raises(BadRow, match=problem):
        prepared(Row(ROW.turns, ROW.images, meta=meta, where="f:1"), task)


def test_the_same_row_asks_for_one_reply_or_for_turns():
    one, turns = prepared(ROW, "jigsaw"), prepared(ROW, "jigsaw_turns")
    assert one.turns == ROW.turns and "swap two places at a time" in turns.turns[-1].content and turns.images == ROW.images
    assert find_task("jigsaw").environment is None and find_task("jigsaw_turns").environment is Board
