"""A hook of mkdocs: puts into the pages every figure and table that can change, from the results files and from the code itself.

A page writes {{ name }}; `TABLES` has the names. Paths are relative to the repository, where mkdocs runs.
"""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

RESULTS = Path("bench/results/cpu-2core")
SOURCES = {
    "grpo": "[2402.03300](https://arxiv.org/abs/2402.03300)",
    "bnpo": "TRL's name for a mean over the micro-batch's tokens",
    "dr_grpo": "[2503.20783](https://arxiv.org/abs/2503.20783)",
    "dapo": "[2503.14476](https://arxiv.org/abs/2503.14476)",
    "gspo": "[2507.18071](https://arxiv.org/abs/2507.18071)",
    "cispo": "[2506.13585](https://arxiv.org/abs/2506.13585)",
    "sapo": "[2511.20347](https://arxiv.org/abs/2511.20347)",
    "luspo": "[2602.05261](https://arxiv.org/abs/2602.05261)",
    "vespo": "[2602.10693](https://arxiv.org/abs/2602.10693)",
}
EXAMPLE = {"rows": 4096, "vocab": 152064, "width": 3584, "workspace_mb": 700}


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Called by mkdocs for every page. KeyError for a name that no table has."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: TABLES[match[1]](), markdown)


def named_losses() -> str:
    """GRPOSpec.named's combinations, fields with their own values only."""
    from actial_fast.ops.spec import NAMED, GRPOSpec

    rows = []
    for name, changes in NAMED.items():
        told = ", ".join(f"`{field}={value!r}`" for field, value in changes.items())
        rows.append((f"`{name}`", told, SOURCES[name]))
    defaults = ", ".join(f"`{f.name}={f.default!r}`" for f in fields(GRPOSpec) if f.default is not MISSING)
    return f"{table(('name', 'fields', 'source (arXiv)'), rows)}\n\nDefaults: {defaults}."


def tasks_learned() -> str:
    """First and last points of the curves of bench.learning.tasks."""
    file = max(RESULTS.glob("tasks-*.json"))
    found = json.loads(file.read_text())
    rows = []
    for each in found["tasks"]:
        held = [point for point in each["held_out"] if point["stage"] == "grpo"]
        scores = [point["score"] for point in held]
        figures = (each["reward"][0], each["reward"][-1], scores[0], max(scores), scores[-1])
        rows.append((f"`{each['task']}`", str(each["grpo_steps"]), *(f"{figure:.2f}" for figure in figures)))
    machine = found["tasks"][0]["machine"]
    names = ("recipes", "GRPO steps", "reward, first tenth", "last tenth", "held-out score before", "best", "last")
    told = f"`{found['command']}` on {machine['cores']} cores of a {machine['cpu']}, {machine['date']}; all points are in `{file}`."
    return f"{table(names, rows)}\n\n{told}"


def benchmarks() -> str:
    """The benchmarks there is a spec for, by the catalogue."""
    from actial_fast.evaluation.catalogue import all_sets

    rows = [(f"`{of.name}`", of.title, of.headline, ", ".join(of.published) or "", of.page) for of in all_sets()]
    return table(("name", "set", "headline", "published here", "its owner's page"), rows)


def signs() -> str:
    """The rules of the report's signs of trouble."""
    from actial_fast.report.troubles import DEFINED, SIGNS

    rows = [(f"`{sign.metric}`", sign.says, sign.advice) for sign in SIGNS]
    undefined = ", ".join(f"`{name}`" for name in DEFINED)
    rows.append((undefined, "was NaN or infinite", "look at the rows of the first such step; lower optim.lr if it comes again"))
    better = "take the checkpoint of the best step, if `save.keep` left it"
    rows.append(("accuracy", "fell from a stage's best evaluation to its last, on the same rows, by more than chance explains", better))
    return table(("figure", "what is told", "what is usually done"), rows)


def memory_example() -> str:
    """Rows of a chunk and number of chunks at EXAMPLE, by the functions that the ops call; meta tensors, so nothing is allocated."""
    import torch

    from actial_fast.kernels.chunks import cut, row_bytes
    from actial_fast.kernels.head import make_head
    from actial_fast.ops.chunks import plan

    rows, vocab, width, budget = EXAMPLE.values()
    told = []
    for name, dtype, cuda in (
        ("CPU, float32", torch.float32, False),
        ("CPU, bfloat16 (computed in float32)", torch.bfloat16, False),
        ("CUDA, bfloat16", torch.bfloat16, True),
    ):
        hidden, weight = (torch.empty(n, width, dtype=dtype, device="meta") for n in (rows, vocab))
        if cuda:
            head = make_head(hidden, weight, torch.empty(rows, dtype=torch.int64, device="meta"), None, 1.0, None)
            chunks, unit = cut(head, True, budget), row_bytes(head, True)
            sizes = [stop - start for start, stop in chunks]
        else:
            groups, _ = plan(hidden, weight, budget)
            sizes, unit = [chunk.stop - chunk.start for (chunk,) in groups], 4 * (3 * vocab + 3 * width)
        told.append((name, f"{unit:,}", f"{max(sizes)}", f"{len(sizes)}"))
    return table(("path", "b, bytes a row", "C, rows a chunk", "chunks"), told)


# card: MiB of memory, vendor's bytes a second and dense bf16 operations a second
CARDS = {
    "L4 24 GB": (23034, 0.3e12, 121e12),
    "A100 80 GB": (81920, 2.039e12, 312e12),
    "H100 80 GB": (81559, 3.35e12, 989e12),
    "H200 141 GB": (143771, 4.8e12, 989e12),
    "B200 180 GB": (183359, 8.0e12, 2250e12),
}


def workspace_rule() -> str:
    """The default of workspace_mb in words."""
    from actial_fast.ops.workspace import LEAST, MOST, SHARE

    return (
        f"On the CPU, and with `vocab_parallel`: {LEAST:,.0f} MiB. On CUDA: {SHARE:.0%} of the card's **total** memory, at least "
        f"{LEAST:,.0f} and at most {MOST:,.0f} MiB."
    )


def workspaces() -> str:
    """The default workspace of a card, the rows of a chunk that it makes at EXAMPLE, and what adding to the head's gradient costs."""
    import torch

    from actial_fast.kernels.chunks import cut
    from actial_fast.kernels.head import make_head
    from actial_fast.ops.workspace import share_of

    told = []
    hidden, weight = (torch.empty(n, EXAMPLE["width"], dtype=torch.bfloat16, device="meta") for n in (100_000, EXAMPLE["vocab"]))
    head = make_head(hidden, weight, torch.empty(100_000, dtype=torch.int64, device="meta"), None, 1.0, None)
    for card, (memory, bandwidth, rate) in CARDS.items():
        budget = share_of(memory)
        rows = cut(head, True, budget)[0][1]
        told.append(f"| {card} | {budget:,.0f} | {rows:,} | {4 / 3 * 0.7 * rate / bandwidth / rows:.1%} |")
    return "\n".join(told)


def logits_gib() -> str:
    """(T, V) in float32 at EXAMPLE."""
    return f"{EXAMPLE['rows'] * EXAMPLE['vocab'] * 4 / 2**30:.2f}"


def ledger() -> str:
    """What the sides of the newest narrow ledger execute."""
    rows = [
        (name, f"{side['total_ratio']:.3f} x", f"{side['rows']:,}", f"{side['tower_images']} of {side['distinct_images']} distinct")
        for name, side in newest("ledger-narrow")["sides"].items()
    ]
    return table(("", "FLOPs over the least", "rows through the language model", "images through the tower"), rows)


def ledger_about() -> str:
    """Its case and machine."""
    found = newest("ledger-narrow")
    return f"{found['what']}; {machine(found)}"


def update() -> str:
    """Seconds and memory of the newest update beside TRL."""
    rows = []
    for side in newest("update")["sides"]:
        settings = ", ".join(f"{name} {value}" for name, value in side["settings"].items())
        rows.append((side["side"], f"{side['seconds_median']:.1f}", f"{side['peak_mib']:,.0f}", settings))
    return table(("", "seconds, median", "peak memory, MiB", "settings"), rows)


def update_about() -> str:
    """Its case and machine."""
    found = newest("update")
    case, tokens = found["settings"], found["tokens"]
    return (
        f"{case['prompts']} prompts ({tokens['prompts']:,} tokens), {case['n']} completions each ({tokens['completions']:,} tokens), "
        f"{found['patches']:,} image patches, {case['rounds']} rounds side by side, {case['threads']} threads, losses equal within "
        f"{found['loss_difference']:.0e}; {machine(found)}"
    )


def loss_memory() -> str:
    """Peak memory of the newest comparison of the loss's ways to its gradients."""
    rows = [(side["side"], f"{side['peak_mib']:,.0f}", f"{side['seconds']:.1f}") for side in newest("loss-memory")["sides"]]
    return table(("", "peak, MiB", "seconds"), rows)


def loss_memory_about() -> str:
    """Its case and machine."""
    found = newest("loss-memory")
    case = found["settings"]
    return (
        f"T = {case['rows']}, V = {case['vocabulary']}, H = {case['hidden']}, {case['dtype']}, {case['threads']} thread; the gradients "
        f"are {found['gradients_mib']} MiB of each; equal within {found['difference']:.0e}; {machine(found)}"
    )


def plan_assumptions() -> str:
    """What `actial plan` assumes, by the constants it assumes it with."""
    from actial_fast.budget import gpus, phases, rates, seconds, workload

    def gb(size: float) -> str:
        return f"{size / gpus.GB:g} GB"

    def span(values: tuple[float, float], unit: str) -> str:
        return f"{values[0]:g} to {values[1]:g} {unit}" if unit else f"{values[0]:.0%} to {values[1]:.0%}"

    disk, pcie = (tuple(x / gpus.GB for x in rate) for rate in (seconds.DISK, seconds.PCIE))
    rows = [
        (
            "usable memory of a GPU",
            f"its GB, of 1e9 bytes, which is less than the driver shows, less {gpus.FRAGMENTS:.0%} that the allocator cannot use, "
            f"{gb(gpus.CONTEXT)} for CUDA's context, and {gb(gpus.CHANNELS)} for NCCL where there are several ranks",
        ),
        (
            "a micro-batch",
            "full: `pack_tokens` tokens, and as many patches as the lengths say, at most `pack_patches`; of rows that are known, no more "
            "than a rank has of an optimizer step",
        ),
        (
            "rows whose data are not here",
            f"{workload.PROMPT} tokens of a prompt, {workload.IMAGES} of them of images; {workload.REPLY} of a reply, "
            f"{workload.ANSWER} of an answer",
        ),
        ("FSDP", f"{phases.BLOCKS_IN_FLIGHT} layers' weights and gradients at once, and the float32 message that sums them"),
        ("vLLM", f"{gb(phases.ENGINE)} beside weights, keys and values; {gb(phases.ASLEEP)} while it sleeps"),
        ("a rank's process", f"{gb(phases.PROCESS)} of host memory, with CUDA"),
        (
            "speed that nobody measured",
            f"{span(rates.SHARES, '')} of the datasheet's bf16 TFLOP/s for passes, {span(rates.READS, '')} of its bandwidth for decoding",
        ),
        ("disk, and the way to the host", f"{span(disk, 'GB/s')}; {span(pcie, 'GB/s')}"),
        ("messages between ranks", "hidden by the passes at best, not at all at worst"),
    ]
    return table(("what", "how much"), rows)


def plan_scaling() -> str:
    """The predicted step on 1, 2, 4 and 8 GPUs."""
    rows = []
    for each in newest("scaling")["rows"]:
        sample, update = (" to ".join(f"{x:.0f} s" for x in each["computed"][name]) for name in ("sample", "update"))
        over = " and ".join(f"{each['heaviest_over_mean'][name]:.3f}" for name in ("sample", "update"))
        shares = ("{:.0%} to {:.0%}".format(*each[f"{name}_efficiency"]) for name in ("update", "step"))
        rows.append((f"{each['gpus']}", sample, update, over, f"{each['sent_gb']:,.0f} GB", *shares))
    head = (
        "GPUs",
        "drawing replies",
        "update",
        "heaviest rank over the mean, of both",
        "sent by a rank",
        "efficiency of the update",
        "of the step",
    )
    return table(head, rows)


def plan_scaling_about() -> str:
    """Its assumptions and machine."""
    found = newest("scaling")
    return f"{found['rates']}; {found['workload']}; {machine(found)}"


def plan_memory() -> str:
    """The plan's memory beside a process's, of the newest comparison."""
    rows = [(f"{c['measured_mb']:,.0f}", f"{c['predicted_mb']:,.0f}", f"{c['off']:+.1%}") for c in newest("memory")["cases"]]
    names = [c["case"] for c in newest("memory")["cases"]]
    return table(("", "measured, MB", "plan, MB", "off by"), [(name, *row) for name, row in zip(names, rows, strict=True)])


def plan_memory_about() -> str:
    """Its model and machine."""
    found = newest("memory")
    return f"hidden {found['settings']['hidden']}, {found['settings']['layers']} layers; {machine(found)}"


def plan_recipes() -> str:
    """What the plan says of the shipped recipes."""
    rows = []
    for each in newest("memory")["recipes"]:
        phases = ", ".join(f"{name} {size}" for name, size in each["gb"].items())
        took = " to ".join(f"{s / 60:.1f}" if s >= 60 else f"{s / 60:.2f}" for s in each["step_seconds"])
        rows.append((each["recipe"], f"`{each['command']}`", f"{each['usable_gb']}", phases, f"{took} min", f"{each['host_gb']}"))
    return table(("", "command", "GB usable", "GB on a GPU, by phase", "a step, not measured", "host GB"), rows)


def comm() -> str:
    """What a step's passes send, by how weights are kept."""
    rows = []
    for each in newest("comm-7b")["rows"]:
        way = f"reshard {each['reshard']}, reduce {each['reduce']}" if each["fsdp"] else "no sharding"
        way += f", replicate {each['replicate']}" if each["replicate"] > 1 else ""
        seen, least = sum(each["seen_gb"].values()), sum(each["least_gb"].values())
        sent = "sent_gb" in each and f"{sum(each['sent_gb'].values()):.1f}"
        rows.append((each["pass"], way, f"{sum(each['calls'].values()):,.0f}", f"{seen:.1f}", f"{least:.1f}", sent))
    return table(("pass", "ways", "calls", "GB in collectives", "the least", "GB a rank sends"), rows)


def comm_about() -> str:
    """Its case and machine."""
    found = newest("comm-7b")
    return f"{found['what']}; {found['ranks']} ranks, {found['micro_batches']} micro-batches; nothing is sent; {machine(found)}"


def accuracy_about() -> str:
    """Sizes and versions of the accuracy table."""
    found = json.loads((RESULTS / "accuracy.json").read_text())
    sizes = ", ".join(f"{name} = {size}" for name, size in found["sizes"].items())
    return f"{sizes}; " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def nearer_in_bf16() -> str:
    """How many times as far from float64 TRL's gradients of hidden states are as ours, in bfloat16, for three scales of logits."""
    found = json.loads((RESULTS / "accuracy.json").read_text())
    rows = [row for row in found["rows"] if row["dtype"] == "bfloat16"]
    error = {(row["case"], row["implementation"]): row.get("dhidden_rms") for row in rows}
    times = [error[case, "TRL chunked log-prob"] / error[case, "linear_grpo_loss, CPU"] for case in ("scale 1", "scale 4", "scale 16")]
    return ", ".join(f"{x:.1f}" for x in times[:-1]) + f" and {times[-1]:.1f} times"


def newest(prefix: str) -> dict:
    """The results file of that name with the latest date."""
    return json.loads(sorted(RESULTS.glob(f"{prefix}-*.json"))[-1].read_text())


def machine(found: dict) -> str:
    """Where and when a result was measured."""
    about = found["machine"]
    return f"{about['cpu']}, {about['cores']} cores, {about['date']}, commit {about['commit']}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


TABLES = {
    f.__name__: f
    for f in (
        *(benchmarks, named_losses, memory_example, workspace_rule, workspaces, logits_gib, accuracy_about, nearer_in_bf16),
        *(ledger, ledger_about, update, update_about, loss_memory, loss_memory_about),
        *(plan_memory, plan_memory_about, plan_recipes, plan_assumptions, plan_scaling, plan_scaling_about),
        *(comm, comm_about, tasks_learned, signs),
    )
}
