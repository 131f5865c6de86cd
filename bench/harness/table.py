"""The result of a run as lines for a terminal and as Markdown."""

from __future__ import annotations

from typing import Any


def heading(machine: dict[str, Any]) -> str:
    """One line: the chip, the versions, the day and the commit."""
    return f"{chip(machine)}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}, commit {machine['commit']}"


def chip(machine: dict[str, Any]) -> str:
    """The GPU, or the CPU with its cores and the threads that torch used."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores ({machine['torch_threads']} threads)"


def text(case: dict[str, Any]) -> str:
    """A case for the terminal, one line a side."""
    width = max(len(side["side"]) for side in case["sides"]) if case["sides"] else 0
    lines = [f"{case['case']}  ({case['dtype']}, {case['seconds']:.0f} s{_ceiling(case)})"]
    for side in case["sides"]:
        told = "  ".join(f"{value:>{size}}" for value, size in zip(_figures(case, side), (11, 16, 9, 11), strict=True))
        lines.append(f"  {side['side']:<{width}}  {told if side['status'] == 'measured' else side['status']}")
    saved = half_backward(case)
    return "\n".join([*lines, f"  {saved}"] if saved else lines)


def half_backward(case: dict[str, Any]) -> str | None:
    """What the backward products cost when half of the rows leave them: (half - none) / (all - none)."""
    ms = {side["side"]: side["ms"]["median"] for side in case["sides"] if side["status"] == "measured"}
    whole, half, none = (ms.get(f"ours, {share} of the rows") for share in ("100%", "50%", "0%"))
    if whole is None or half is None or none is None:
        return None
    return f"backward with half of the rows: {(half - none) / (whole - none):.1%} of the full one"


def fastest(case: dict[str, Any], ours: bool) -> dict[str, Any] | None:
    """The fastest measured side of ours, or of the others."""
    found = [x for x in case["sides"] if x["status"] == "measured" and x["side"].startswith("ours") == ours]
    return min(found, key=lambda side: side["ms"]["median"], default=None)


def markdown(result: dict[str, Any]) -> str:
    """The whole run: a table for every case."""
    settings = result["settings"]
    lines = [
        f"# {heading(result['machine'])}",
        "",
        "Written by `python -m bench.kernels.ops`; `time` is the median of the rounds, `rate` counts the",
    ]
    lines += ["op's floor, `share` is that rate over the ceiling of the same rounds, `peak` is above inputs and outputs."]
    if settings["budget_seconds"]:
        lines += ["", f"Budget: {settings['budget_seconds']:.0f} s; what did not fit is listed as skipped."]
    lines += [
        "",
        "| case | ours, the fastest | share of the ceiling | the fastest of the others | ours is faster by |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        ours, other = fastest(case, ours=True), fastest(case, ours=False)
        if ours is None or case["variant"] == "zero rows":  # whose sides do different work
            continue
        ms = ours["ms"]["median"]
        told = f"{other['side']}: {other['ms']['median']:.4g} ms | {other['ms']['median'] / ms:.2f}x" if other else "none measured |"
        lines.append(f"| {case['case']} | {ours['side']}: {ms:.4g} ms | {ours['share']:.1%} | {told} |")
    for case in result["cases"]:
        lines += ["", f"## {case['case']}", "", f"{case['dtype']}{_ceiling(case)}{_state(case)}", ""]
        lines += ["| side | time (min, rounds) | rate | share of the ceiling | peak | error |", "|---|---|---|---|---|---|"]
        for side in case["sides"]:
            if side["status"] != "measured":
                lines.append(f"| {side['side']} | {side['status'].replace('|', '/')} | | | | |")
                continue
            time, rate, share, peak = _figures(case, side)
            ms, worst = side["ms"], max(side["error"].values())
            lines.append(f"| {side['side']} | {time} ({ms['min']:.4g}, {ms['rounds']}) | {rate} | {share} | {peak} | {worst:.1e} |")
        lines += ["", half_backward(case)] if half_backward(case) else []
    return "\n".join(lines) + "\n"


def _figures(case: dict[str, Any], side: dict[str, Any]) -> tuple[str, str, str, str]:
    if side["status"] != "measured":
        return "", "", "", ""
    return f"{side['ms']['median']:.4g} ms", f"{side['rate']:.4g} {case['unit']}", f"{side['share']:.1%}", f"{side['peak_mib']:,.0f} MiB"


def _ceiling(case: dict[str, Any]) -> str:
    return f", ceiling {case['ceiling']['rate']:.4g} {case['unit']}" if "ceiling" in case else ""


def _state(case: dict[str, Any]) -> str:
    state = case.get("gpu_after")
    return f"; after it {state['sm_mhz']:.0f} MHz, {state['power_w']:.0f} W, {state['celsius']:.0f} °C" if state else ""
