"""What a source holds: every figure against rows whose figures are known, lengths against what training makes of a row."""

import json

import numpy as np
import pytest
from PIL import Image

from actial_fast.cli.main import main
from actial_fast.data.sources.picture import size
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.stats import BINS, distribution, stats
from actial_fast.data.sources.stream import Example
from actial_fast.model.processor import Processor
from actial_fast.report.holdings import holdings_page, holdings_text


@pytest.fixture
def rows(tmp_path):
    """Six rows: two pictures, one picture twice, none, a missing one in two rows, and one that is no row."""
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(tmp_path / "b.jpg", exif=exif)

    def line(name: str, images: list[str], answer: str, **more) -> str:
        said = [{"role": "user", "content": "<image>" * len(images) + "Which way?"}, {"role": "assistant", "content": answer}]
        return json.dumps({"id": name, "messages": said, "images": images, "truth": answer, **more})

    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            (
                line("1", ["a.png", "b.jpg"], "left", kind="turn", choices=["left", "right"], meta={"yaw_deg": 20, "of": {"name": "cup"}}),
                line(
                    "2", ["a.png", "a.png"], "right", kind="turn", choices=["left", "right"], meta={"yaw_deg": 40.5, "of": {"name": "cup"}}
                ),
                line("3", [], "left", meta={"seen": True, "yaw_deg": None}),
                line("4", ["gone.png"], "left", kind="turn"),
                line("5", ["a.png", "gone.png"], "left", kind="turn"),
                "{",
            )
        )
    )
    return path


def test_every_figure(rows):
    source = open_source(SourceConfig(str(rows)))
    done: list[int] = []
    found = stats(source, range(len(source)), progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert (found["rows"], found["looked_at"], found["good"], found["bad"]) == (6, 6, 3, 3)
    assert found["reasons"]["image does not exist"] == 2 and len(found["reasons"]) == 2
    assert found["kinds"] == {"": 1, "turn": 2} and found["choices"] == {"0": 1, "2": 2}
    assert found["answers"] == {"different": 2, "commonest": {"left": 2, "right": 1}}
    images = found["images"]
    assert images["per_row"] == {"0": 1, "2": 2} and (images["shown"], images["files"], images["embedded"]) == (4, 2, 0)
    assert images["missing"] == 1 and images["missing_files"][0].endswith("gone.png"), "a file, however many rows show it"
    assert {k: v["max"] for k, v in found["lengths"].items()} == {
        "image_width": 100,
        "image_height": 80,  # of the one that is stored lying on its side
        "question_characters": 10,
        "reply_characters": 5,
    }
    assert found["meta"]["yaw_deg"]["count"] == 2 and found["meta"]["yaw_deg"]["mean"] == 30.25
    assert found["meta"]["of.name"]["commonest"] == {"cup": 2} and found["meta"]["seen"]["commonest"] == {"True": 1}


def test_lengths_are_those_that_training_makes(lab):
    processor = Processor.load(str(lab.model))
    for path in (lab.questions / "train.jsonl", lab.spatial / "train.parquet"):
        source = open_source(SourceConfig(str(path), limit=12))
        for index in range(len(source)):
            example = Example(source[index], index)
            for turns, made in ((example.row.turns, processor.encode(example)), (example.row.prompt, processor.encode_prompt(example))):
                told = processor.measure(example, turns)
                assert (told.prompt, told.reply) == (int((~made.trained).sum()), int(made.trained.sum()))
                assert told.patches == made.patches and told.images == int((made.ids == processor.image_token).sum())


def test_what_training_refuses_is_a_bad_row(lab):
    source = open_source(SourceConfig(str(lab.questions / "train.jsonl"), limit=3))
    processor = Processor.load(str(lab.model), max_prompt=3)
    found = stats(source, range(3), lambda row, index: processor.measure(Example(row, index), row.turns))
    assert found["bad"] == 3 and "over max_prompt_tokens=#" in next(iter(found["reasons"]))


@pytest.mark.parametrize(
    "values", [[5], [1, 2, 2, 3], [*range(1000)], [0.5, 0.25, 0.5], [-3.5, 1e9], [0.1] * 3, [1e-300, 2e-300]], ids=lambda v: str(v[:3])
)
def test_a_distribution_counts_every_value_once(values):
    found = distribution(values)
    assert sum(found["counts"]) == found["count"] == len(values) and len(found["edges"]) == len(found["counts"]) + 1 <= BINS + 2
    assert (np.diff(found["edges"]) > 0).all() and found["edges"][0] == min(values)
    assert found["min"] <= found["p5"] <= found["median"] <= found["p95"] <= found["p99"] <= found["max"]
    assert found["median"] in values and found["mean"] == pytest.approx(sum(values) / len(values))
    json.dumps(found)


def test_a_size_is_the_decoded_pictures(rows):
    assert size(rows.parent / "a.png", "") == (50, 100) and size(rows.parent / "b.jpg", "") == (80, 60)
    assert size((rows.parent / "b.jpg").read_bytes(), "") == (80, 60)
    with pytest.raises(BadRow, match="over 100 pixels"):
        size(rows.parent / "a.png", "f:1", 100)
    with pytest.raises(BadRow, match="is text, not a picture"):
        size(b"hello", "f:1")


def test_text_and_page_say_what_there_is(rows):
    source = open_source(SourceConfig(str(rows)))
    found = stats(source, range(len(source)))
    text, page = holdings_text("rows <1>", found), holdings_page({"rows <1>": found, "again": found})
    assert text.startswith("rows <1>: 6 rows, 3 bad\nimages a row: 0: 1 rows, 2: 2 rows; 2 files; 1 missing")
    for shown in ("image does not exist", "turn", "meta.yaw_deg", "gone.png", "cup"):
        assert shown in text and shown in page
    assert "rows &lt;1&gt;" in page and "<script" not in page and page.count("<figure") == 2 * 4, "of what differs"
    empty = stats(source, [5])
    assert "1 bad" in holdings_text("none", empty) and holdings_page({"none": empty})


def test_the_command(lab, rows, tmp_path, capsys):
    def run(*args) -> str:
        assert main(["-q", "data", "stats", *map(str, args)]) == 0
        return capsys.readouterr().out

    assert "without --model" in run(rows)
    train = lab.questions / "train.jsonl"
    told = json.loads(run(train, "--model", lab.model, "--rows", 5, "--json", "-", "-o", tmp_path / "page.html"))
    assert told[str(train)]["looked_at"] == 5 and told[str(train)]["lengths"]["sequence_tokens"]["count"] == 5
    assert "<svg" in (tmp_path / "page.html").read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"kind: grpo\nmodel: {{path: {lab.model}}}\ndata: {{sources: [{{path: {train}, limit: 4}}], max_prompt_tokens: 5}}\n"
        f"eval: {{sources: [{{path: {lab.questions / 'test.jsonl'}, limit: 2}}]}}\n"
    )
    told = json.loads(run(recipe, "--json", "-"))
    assert [figures["rows"] for figures in told.values()] == [4, 2]
    assert told[f"data.sources.0 {train}"]["bad"] == 4, "a row that the loop would refuse is a bad one"
    assert main(["-q", "data", "stats", str(rows), "--rows", "-1"]) == 2
