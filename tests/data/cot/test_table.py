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


def wrong(found: dict[bool, list[tuple[dict, str | None]]]) -> dict[bool, list[str]]:
    """Those that are judged wrongly, true and false."""
    return {
        truth: [f"{chain['text'][:60]}: {reason}" for chain, reason in each if (reason is None) != truth] for truth, each in found.items()
    }


@pytest.fixture(scope="module")
def judged():
    """Both files, judged once."""
    return {name: chains(name) for name in ("tuned", "held")}


@pytest.mark.parametrize(("name", "share"), [("tuned", 0.95), ("held", 0.9)])
def test_chains_are_judged_right(judged, name, share):
    found, bad = judged[name], wrong(judged[name])
    assert len(found[True]) >= 14 and len(found[False]) >= 14
    for truth in (True, False):
        assert len(bad[truth]) <= (1 - share) * len(found[truth]), "\n".join(bad[truth])


def test_the_whole_table(judged):
    """At least forty true and sixty false chains, and of each nineteen in twenty judged right."""
    for truth, least in ((True, 40), (False, 60)):
        number = sum(len(found[truth]) for found in judged.values())
        assert number >= least and sum(len(wrong(found)[truth]) for found in judged.values()) <= 0.05 * number


def test_the_reason_is_of_the_faults_kind(judged):
    for chain, reason in judged["tuned"][False]:
        if chain["fault"] == "leak":
            assert reason.startswith(("talks of a given answer", "false statement", "undecided")), (chain, reason)
        elif chain["fault"].startswith(("argues", "angle", "the angle")):
            assert reason.startswith("false statement"), (chain, reason)
        elif chain["fault"] == "the answer":
            assert reason == "wrong answer"
        elif chain["fault"].startswith("too short"):
            assert reason.startswith("too short")


if __name__ == "__main__":
    for name in ("tuned", "held"):
        judged_now = chains(name)
        for truth, found in judged_now.items():
            bad = wrong(judged_now)[truth]
            print(f"{name}: {len(found) - len(bad)} of {len(found)} {'true' if truth else 'false'} chains judged right", *bad, sep="\n  ")
