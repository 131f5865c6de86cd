"""The judge's table: chains of thought about pairs that were written by hand, true ones and false ones, each with what is wrong with it.

The rules were tuned on chains/tuned.yaml. chains/held.yaml was written afterwards: `python -m tests.data.cot.test_table` prints both.
"""

from pathlib import Path

import pytest
import yaml

from actial_fast.data.cot.checking import MODELS, check_cot
from actial_fast.data.cot.pairs import PAIR
from actial_fast.data.sources.row import Row, Turn

NAMES = ("ego_translation", "object_translation", "ego_rotation", "azimuth_change_deg", "yaw_deg")
PAIRS = {
    "R": ("right", "left", "left", 42, 38),
    "L": ("left", "right", "right", -55, -60),
    "Rr": ("right", "left", "right", 30, -25),
    "S": ("no movement", "no movement", "no rotation", 0, 0),
    "P": ("no movement", "no movement", "left", 0, 45),
    "W": ("left", "right", "right", -90, -85),
}


def chains(name: str) -> dict[bool, list[tuple[dict, str | None]]]:
    """Of a file's chains, true and false: each and why it is rejected."""
    found = yaml.safe_load((Path(__file__).parent / "chains" / f"{name}.yaml").read_text())
    out = {}
    for label in ("true", "false"):
        out[label == "true"] = []
        for chain in found[label]:
            meta = dict(zip(NAMES, PAIRS[chain["truth"]], strict=True))
            row = Row((Turn("user", "?"),), truth=", ".join(map(str, PAIRS[chain["truth"]][:3])), kind=PAIR, meta=meta)
            reply = f"<think>{chain['text'].strip()}</think>\n<answer>{chain.get('answer', row.truth)}</answer>"
            out[label == "true"].append((chain, check_cot(reply, row, MODELS[PAIR])))
    return out


def wrong(name: str) -> dict[bool, list[str]]:
    """The chains of a file that are judged wrongly, true and false."""
    return {
        truth: [f"{chain['text'][:60]}: {reason}" for chain, reason in found if (reason is None) != truth]
        for truth, found in chains(name).items()
    }


@pytest.mark.parametrize(("name", "share"), [("tuned", 0.95), ("held", 0.6)])
def test_chains_are_judged_right(name, share):
    found, bad = chains(name), wrong(name)
    assert len(found[True]) >= 20 and len(found[False]) >= 20
    for truth in (True, False):
        assert len(bad[truth]) <= (1 - share) * len(found[truth]), "\n".join(bad[truth])


def test_what_is_wrong_is_named_with_its_sentence():
    """The reason that a false chain gets is of the fault's kind, and its sentence stands in the chain."""
    for chain, reason in chains("tuned")[False]:
        if reason is None:
            continue
        if chain["fault"] == "leak":
            assert reason.startswith(("talks of a given answer", "false statement", "undecided")), (chain, reason)
        if chain["fault"].startswith("argues"):
            assert "argues from positions in the picture" in reason or "false statement" in reason, (chain, reason)
        if chain["fault"] == "the answer":
            assert reason == "wrong answer"


if __name__ == "__main__":
    for name in ("tuned", "held"):
        for truth, found in chains(name).items():
            bad = wrong(name)[truth]
            print(f"{name}: {len(found) - len(bad)} of {len(found)} {'true' if truth else 'false'} chains judged right", *bad, sep="\n  ")
