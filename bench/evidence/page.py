"""The tables and plots of docs/evidence.md, from bench/results/evidence.

    python -m bench.evidence.page

Writes tables as Markdown beside the results and the plots into docs/evidence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.evidence import budget
from bench.evidence.machine import key

ROOT = Path(__file__).parents[2]
RESULTS, DRAWINGS = ROOT / "bench/results/evidence", ROOT / "docs/evidence"
OURS, OTHER, LIGHT, INK, DIM, EDGE = "#0b6fc2", "#b4bcc6", "#9cc7ea", "#1b1f24", "#667079", "#dfe3e8"
WIDTH = 3584  # of the head whose tile the epilogue is compared with
BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
Records = Sequence[dict[str, Any]]


def records(part: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{part}.json").read_text())["records"]


def draw() -> None:
    """Write everything."""
    for name, told in tables().items():
        (RESULTS / f"{name}.md").write_text(told)
    DRAWINGS.mkdir(exist_ok=True)
    products, memory, before = _shown()
    draw_epilogues(products, before, DRAWINGS / "epilogues.svg")
    draw_budgets(memory, before, records("peers"), DRAWINGS / "budgets.svg")


def tables() -> dict[str, str]:
    """The page's tables as Markdown, from the results."""
    products, memory, before = _shown()
    found = {
        "products": products_table(products, before),
        "budget": budget_table(memory, before),
        "ledger": ledger_table(records("ledger")),
        "l2": l2_table(records("l2")),
        "peers": peers_table(records("peers"), products, memory),
    }
    return {name: told + "\n" for name, told in found.items()}


def _shown() -> tuple[Records, Records, dict[str, dict[str, Any]]]:
    """The products and the memory-bound kernels in bf16 that are told of, each variant of a chip once; and what was measured before."""
    once: dict[tuple[str, int], dict[str, Any]] = {}
    memory: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in records("machine"):
        if one["dtype"] == "bf16" and "loop" in one:
            once.setdefault((name_of(one), one["arch"]), one)
        elif one["dtype"] == "bf16" and "gspo" not in one["case"] and "row temperature" not in one["case"]:
            memory.setdefault((one["kernel"], one["case"], one["arch"]), one)
    return list(once.values()), list(memory.values()), {key(one): one for one in records("before")}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(one: dict[str, Any]) -> str:
    """A product's kernel with what tells its variants apart."""
    variant = one["variant"]
    told = []
    if "STORE" in variant:
        told.append("stores exponentials" if variant["STORE"] == "True" else "no gradient")
    if variant.get("HAS_CAP") == "True":
        told.append("bias, softcap, row temperature")
    if "ADD" in variant:
        told.append("adds to the sum" if variant["ADD"] == "True" else "first chunk")
    return f"{one['kernel'].removesuffix('_kernel')}{', ' if told else ''}{', '.join(told)}"


def _was(one: dict[str, Any], before: dict[str, dict[str, Any]], name: str, form: str) -> str:
    """ "then -> now" of a figure, or now alone where it has not changed or was not there."""
    then, now = before.get(key(one), {}).get(name), format(one[name], form)
    return now if then is None or format(then, form) == now else f"{format(then, form)} → **{now}**"


def products_table(products: Records, before: dict[str, dict[str, Any]]) -> str:
    rows = []
    for one in products:
        tile = one["tensor_cycles"] * -(-WIDTH // 64)
        cells = [
            f"{name_of(one)}, sm_{one['arch']}",
            _was(one, before, "registers", "d"),
            f"{one['spills']}",
            _was(one, before, "loop", "d"),
            _was(one, before, "issue_share", ".0%"),
            _was(one, before, "barriers", "d"),
            f"{one['in_flight']}" if one["in_flight"] >= 0 else "",
            _was(one, before, "per_element", ".1f"),
            _was(one, before, "epilogue_cycles", ",d"),
            f"{one['epilogue_cycles'] / (one['epilogue_cycles'] + tile):.0%}" if "logits" in one["kernel"] else "",
        ]
        rows.append(cells)
    head = ("product", "registers", "spills", "loop, instructions", "issue share", "barriers", "left in flight")
    return table((*head, "epilogue, instructions an element", "epilogue, cycles", f"share of a tile, H = {WIDTH:,}"), rows)


def budget_table(memory: Records, before: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name in dict.fromkeys((one["kernel"], one["case"]) for one in memory):
        chips = {one["arch"]: one for one in memory if (one["kernel"], one["case"]) == name}
        told = [_was(chips[arch], before, "instructions_per_16_bytes", ".0f") if arch in chips else "" for arch in (80, 90, 100)]
        shares = [f"{chips[arch]['shares'][card]:.0%}" if arch in chips else "" for card, (arch, _) in budget.CARDS.items()]
        rows.append([f"{name[0].removesuffix('_kernel')} ({name[1]})", *told, *shares])
    return table(("kernel (case)", *(f"instructions for 16 bytes, sm_{arch}" for arch in (80, 90, 100)), *budget.CARDS), rows)


def ledger_table(found: Records) -> str:
    rows = [[one["kernel"], one["op"], f"{one['touched_over_least']:.3f}", f"{one['asked_over_least']:.3f}"] for one in found]
    return table(("kernel", "op", "touched / least", "asked / least"), rows)


def l2_table(found: Records) -> str:
    rows = [[one["product"], *(f"{one[name] / 1e9:.2f}" for name in ("least", "plain", "shipped"))] for one in found]
    return table(("product", "least, GB", "rows or columns fastest", "shipped order"), rows)


def peers_table(peers: Records, products: Records, memory: Records) -> str:
    ours = [one for one in products if one["arch"] == 90 and one["variant"].get("HAS_CAP") != "True"]
    ours += [one for one in memory if one["arch"] == 90 and one["kernel"] in COMPARED and "all" not in one["case"]]
    rows = [_peer_row("**actial_fast**", name_of(one) if "loop" in one else one["kernel"].removesuffix("_kernel"), one) for one in ours]
    for one in peers:
        name = f"{one['peer']} {one.get('version', '')}".strip()
        if "missing" in one:
            rows.append([name, one["missing"], *[""] * 8])
        else:
            rows.append(_peer_row(name, f"{one['kernel']} {one['variant']}".strip(), one))
    head = ("package", "kernel", "registers", "spills", "matrix instructions an issue slot", "issue share", "barriers", "left in flight")
    return table((*head, "epilogue, instructions an element", "instructions for 16 bytes"), rows)


COMPARED = ("logprob_kernel", "gradient_kernel", "grpo_logits_kernel")


def _peer_row(package: str, kernel: str, one: dict[str, Any]) -> list[str]:
    takes = [package, kernel, f"{one['registers']}", f"{one.get('spills', 0)}"]
    if "loop" not in one:
        return [*takes, *[""] * 5, f"{one['instructions_per_16_bytes']:.0f}"]
    loop = [f"{one['matrix'] / one['loop']:.3f}", f"{one['issue_share']:.0%}", f"{one['barriers']}", f"{one['in_flight']}"]
    return [*takes, *loop, f"{one['per_element']:.1f}", ""]


def draw_epilogues(products: Records, before: dict[str, dict[str, Any]], out: Path) -> None:
    """Modelled cycles of the epilogues, before and now; beside each bar its share of a whole tile."""
    shown = [one for one in products if "HAS_CAP" not in one["variant"] or one["variant"]["HAS_CAP"] == "False"]
    figure, axis = plt.subplots(figsize=(8.6, 0.36 * len(shown) + 1.1))
    longest = max(before.get(key(one), one)["epilogue_cycles"] for one in shown)
    for y, one in enumerate(shown):
        then, now = before.get(key(one), one)["epilogue_cycles"], one["epilogue_cycles"]
        axis.barh(y, then, height=0.66, color=OTHER, zorder=2)
        axis.barh(y, now, height=0.66, color=OURS, zorder=3)
        told = f"{now:,}" if then == now else f"{then:,} → {now:,}"
        axis.text(max(then, now) + 0.012 * longest, y, told, va="center", fontsize=7.5, color=INK)
    axis.set_yticks(range(len(shown)), [f"{name_of(one)}, sm_{one['arch']}" for one in shown], fontsize=8)
    axis.set_xlabel("modelled cycles of a tile's epilogue (grey: before; blue: now)", color=DIM, fontsize=8)
    axis.set_xlim(0, 1.2 * longest)
    _finish(figure, axis, len(shown), out)


def draw_budgets(memory: Records, before: dict[str, dict[str, Any]], peers: Records, out: Path) -> None:
    """What the issue rate allows of an H200's bandwidth: our streaming kernels, before and now, and peers' that do the same."""
    card = "H200 SXM"
    bars = []
    for one in memory:
        if one["arch"] == 90:
            then = before.get(key(one), one)
            label = f"{one['kernel'].removesuffix('_kernel')} ({one['case']})"
            bars.append((label, one["shares"][card], then.get("shares", one["shares"])[card], OURS))
    for one in peers:
        if per := one.get("instructions_per_16_bytes"):
            share = budget.share(card, per)
            bars.append((f"{one['peer']}: {one['kernel']}", share, share, LIGHT))
    bars.sort(key=lambda bar: bar[1])
    end = 2.0
    figure, axis = plt.subplots(figsize=(8.6, 0.27 * len(bars) + 1.0))
    for y, (_, now, then, colour) in enumerate(bars):
        axis.barh(y, min(now, end), height=0.68, color=colour, zorder=2)
        if then < 0.98 * now:
            axis.barh(y, min(then, end), height=0.68, color=OTHER, zorder=3)
        told = f"{now:.0%}" if f"{then:.0%}" == f"{now:.0%}" else f"{then:.0%} → {now:.0%}"
        inside = now > 0.8 * end
        where = min(now, end) - 0.012 * end if inside else max(now, then) + 0.012 * end
        look: dict[str, Any] = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": INK, "bbox": BLANK}
        axis.text(where, y, told, va="center", fontsize=7.5, zorder=6, **look)
    axis.axvline(1, color=INK, linewidth=0.9, zorder=5)
    axis.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7.5)
    axis.set_xlim(0, end)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.set_xlabel(f"share of an {card}'s bandwidth that instructions allow, bf16 (light: peers; grey: before)", color=DIM, fontsize=8)
    _finish(figure, axis, len(bars), out)


def _finish(figure: Any, axis: Axes, rows: int, out: Path) -> None:
    axis.set_ylim(rows - 0.45, -0.55)
    axis.tick_params(length=0, colors=INK, pad=3)
    axis.tick_params(axis="x", labelsize=7.5, colors=DIM)
    axis.grid(axis="x", color=EDGE, linewidth=0.6, zorder=0)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(EDGE)
    figure.tight_layout()
    figure.savefig(out, facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
