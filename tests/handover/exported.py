"""A recipe handed over: its rows on the disk, and the words with which its script starts verl's trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from actial_fast.handover.folder import Handed, hand_over
from actial_fast.settings.config import from_dict
from actial_fast.settings.recipe import GRPORecipe

ANSWERS = "ABCD"


def write_rows(folder: Path, count: int = 12, name: str = "rows.jsonl", **more) -> Path:
    """Questions about two images with an answer, in this project's format; some have another answer that is right, too."""
    folder.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(g.integers(0, 255, (30 + i, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    with open(folder / name, "w") as file:
        for i in range(count):
            row = {
                "id": f"row/{i}",
                "messages": [
                    {"role": "user", "content": "<image>And <image>\nWhich way?\nA. left\nB. right\nC. up\nD. down"},
                    {"role": "assistant", "content": ANSWERS[i % 4]},
                ],
                "images": [f"{i % 4}.png", f"{(i + 1) % 4}.png"],
                "truth": [ANSWERS[i % 4], "none of them"] if i % 3 == 0 else ANSWERS[i % 4],
                "kind": "way" if i % 2 else "other",
                "choices": ["left", "right", "up", "down"],
                "meta": {"turn": i / 3, "seen": [i, None]},
            } | more
            file.write(json.dumps(row) + "\n")
    return folder / name


def recipe_of(rows: Path | list[Path], **fields) -> GRPORecipe:
    """A small recipe on these rows; fields as in YAML."""
    sources = [{"path": str(path)} for path in ([rows] if isinstance(rows, Path) else rows)]
    model = {"path": "some/model", "min_pixels": 784, "max_pixels": 1568}
    usual = {"data": {"sources": sources}, "model": model, "prompts": 4, "minibatch": 2, "sampling": {"n": 4, "max_new_tokens": 9}}
    merged = {key: usual[key] | fields.pop(key, {}) if isinstance(usual.get(key), dict) else usual[key] for key in usual}
    return from_dict(GRPORecipe, merged | fields)


def handed(recipe: GRPORecipe, out: Path) -> Handed:
    return hand_over(recipe, "recipe.yaml", out)


def parquet(file: Path) -> list[dict]:
    """The rows of a file, as plain values."""
    return pq.read_table(file).to_pylist()


def words_of(folder: Path, *more: str, **environment: str) -> list[str]:
    """What run.sh starts, asked of the script itself, which a shell runs with another Python."""
    told = folder.parent / "words.json"
    python = folder.parent / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(told)!r}, 'w'))\n")
    python.chmod(0o755)
    subprocess.run(["bash", str(folder / "run.sh"), *more], check=True, env={**os.environ, "PYTHON": str(python), **environment})
    return json.loads(told.read_text())


def overrides_of(folder: Path, *more: str) -> dict[str, str]:
    """key -> value of the overrides, as Hydra is given them."""
    words = words_of(folder, *more)
    assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    return dict(word.split("=", 1) for word in words[2:])
