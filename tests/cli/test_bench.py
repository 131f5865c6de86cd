"""`actial bench` and `actial score` from the command line to the tables and pages."""

import base64
import json
import re
from pathlib import Path

import pytest

from actial_fast.cli.main import main
from actial_fast.evaluation.catalogue import open_set
from tests.endpoint import server


@pytest.fixture(scope="module")
def rows(lab, tmp_path_factory) -> Path:
    """Six test questions of the lab, in a file by themselves."""
    path = lab.questions / "some.jsonl"
    path.write_text("".join((lab.questions / "test.jsonl").read_text().splitlines(keepends=True)[:6]))
    return path


def told(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def accuracy(result: dict) -> float:
    return next(figure["value"] for figure in result["figures"] if figure["name"] == "accuracy")


def replies(folder: Path) -> dict:
    return {r["id"]: r for r in map(json.loads, (folder / "replies.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def served(rows, tmp_path_factory):
    """OUT with two served models: one says "The answer is B.", the other mumbles what a judge reads as A; and that judge."""
    out, asked = tmp_path_factory.mktemp("out"), []

    def answer(body, number):
        asked.append(body)
        if body["model"] == "judge":
            return 200, {}, "<think>it says so</think> A"
        return 200, {}, {"b": "The answer is B.", "mumbles": "hard to tell, really"}[body["model"]]

    with server(answer) as (url, _):
        words = ["bench", rows, "--server", url, "--model", "b", "--model", "second=mumbles", "-o", out, "--max-new-tokens", "9"]
        assert main([*map(str, words), "--json", str(out / "all.json")]) == 0
        yield out, url, asked


def test_a_table_with_both_models_and_how_they_differ(served, rows, capsys):
    out, _, asked = served
    figures = json.loads((out / "all.json").read_text())
    first, second = figures["results"]
    assert (first["model"], second["model"]) == ("b", "second") and second["unread"] == 6 and first["rules"] == {"answer": 6}
    truths = [item.answer for item in open_set(str(rows)).items]
    assert first["figures"][-2]["value"] == pytest.approx(truths.count("B") / 6)
    (pair,) = figures["comparisons"]
    assert (pair["only_first"], pair["only_second"]) == (truths.count("B"), 0)
    lines = told(capsys, "score", out).splitlines()
    head = next(line for line in lines if line.startswith("figure"))
    assert all(word in head for word in ("b", "second", "95%", "chance", "majority"))
    assert any("no answer found in 6" in line for line in lines) and any(line.startswith("Paired comparison") for line in lines)
    assert len(asked) == 12, "scoring asks nobody"


def test_a_judge_reads_what_rules_could_not_once_and_is_counted_apart(served, rows, capsys):
    out, url, asked = served
    before = len(asked)
    for _ in range(2):
        text = told(capsys, "score", out, "--judge", url, "--judge-model", "judge")
    assert "judge was asked about 6, read 6, of which" in text and "second, with the judge" in text
    assert len(asked) - before == 6
    result = json.loads(next(out.rglob("second/result.json")).read_text())
    truths = [item.answer for item in open_set(str(rows)).items]
    assert accuracy(result) == 0 and accuracy(result["judge"]) == pytest.approx(truths.count("A") / 6)
    question = asked[-1]["messages"][0]["content"]
    assert "hard to tell, really" in question and "<image>" not in question and "Which" not in question[:20]
    assert refused(capsys, "score", out, "--judge", url).startswith("actial: --judge and --judge-model")


def test_another_extractor_scores_the_same_replies(served, capsys):
    out, *_ = served
    text = told(capsys, "score", out, "--extractor", "tests.evaluation.kit:always_a", "--as", "markdown", "--errors", 0)
    assert "| figure | n | b | 95% |" in text and "answers found by tests.evaluation.kit:always_a" in text
    assert {r["extracted"] for r in replies(next(out.rglob("second"))).values()} == {"A"}
    assert "replies to look at" not in text
    told(capsys, "score", out)
    assert {r["extracted"] for r in replies(next(out.rglob("second"))).values()} == {None}
    assert "unknown extractor 'nothing'" in refused(capsys, "score", out, "--extractor", "nothing")


def test_latex_escapes_and_json_on_stdout_is_all(served, capsys):
    out, *_ = served
    latex = told(capsys, "score", out, "--as", "latex")
    assert r"ego\_translation" in latex and r"95\%" in latex and latex.count(r"\begin{tabular}") == 2
    figures = json.loads(told(capsys, "score", out, "--json", "-"))
    assert len(figures["results"]) == 2 and {f["name"] for f in figures["results"][0]["figures"]} >= {"accuracy", "ego_rotation"}


def test_wrong_replies_are_shown_with_their_pictures(served, capsys):
    out, *_ = served
    told(capsys, "score", out)
    page = next(out.rglob("second/errors.html")).read_text()
    assert page.count("<article") == 6 and page.count("data:image/png;base64,") == 12
    assert 'data-verdict="unread"' in page and "hard to tell, really" in page and "http" not in page.replace("http-equiv", "")
    assert page.count('<option value="ego_translation">') == 1
    right = next(out.rglob("b/errors.html")).read_text()
    assert right.count("<article") == sum(r["score"] < 1 for r in replies(next(out.rglob("b"))).values())


def test_the_papers_tables_have_their_rows_and_ours(served, rows, lab, capsys):
    out, url, _ = served
    told(capsys, "bench", f"viewpoint={rows}", "--server", url, "--model", "b", "-o", out / "more", "--limit", "3", "--errors", "0")
    text = told(capsys, "bench", "--table", "paper", out)
    assert re.search(r"Actial-7B \(published\) +47.7 +46.4 +60.3 +35.5 +43.0 +83.5 +91.2 +68.7 +85.6 +88.5 +87.6 +99.2 +79.0 +84.6", text)
    assert re.search(r"Qwen2.5-VL-7B \(published\) +23.7 .* 26.5\n", text)
    ours = json.loads(next((out / "more").rglob("result.json")).read_text())["figures"][-1]["value"]
    assert re.search(rf"\nb +not measured +{100 * ours:.1f} ", text), "in section A.1"
    assert re.search(r"\nsecond( +not measured){14}\n", text) and "b: Viewpoint test by 3 questions drawn with seed 0" in text
    assert json.loads(told(capsys, "bench", "--table", "paper", out, "--json", "-"))["results"]


def test_an_export_opens_again_as_the_same_questions(rows, tmp_path, capsys):
    file = tmp_path / "viewpoint.tsv"
    assert told(capsys, "bench", "export", rows, "-o", file).startswith(f"{file}: 6 questions")
    before, after = open_set(str(rows)).items, open_set(str(file)).items
    assert len(after) == 6
    for one, other in zip(before, after, strict=True):
        assert (other.answer, other.options, other.category) == (one.answer, one.options, one.category)
        assert [image.read_bytes() if isinstance(image, Path) else image for image in one.images] == list(other.images)
        question = one.prompt.replace("<image>", "").partition("\n")[0]
        assert f"Question: {question}\nOptions:\nA. {one.options[0]}\n" in other.prompt
    lines = file.read_text().splitlines()
    assert lines[0].split("\t") == ["index", "question", "A", "B", "C", "answer", "category", "image", "image_path"]
    cells = lines[2].split("\t")
    assert cells[-2] == "0", "the pictures of the row above, which VLMEvalKit finds by its index"
    assert base64.b64decode(eval(lines[1].split("\t")[-2])[0])[:4] == b"\x89PNG" and eval(cells[-1]) == ["1_0.png", "1_1.png"]


def test_pictures_of_a_table_are_on_the_page_as_long_as_it_is_there(rows, tmp_path, capsys):
    file = tmp_path / "viewpoint.tsv"
    told(capsys, "bench", "export", rows, "-o", file)
    with server(lambda body, number: (200, {}, "no idea")) as (url, _):
        told(capsys, "bench", file, "--server", url, "--model", "m", "-o", tmp_path / "out")
    page = next((tmp_path / "out").glob("*viewpoint/m/errors.html"))
    assert page.read_text().count("<img") == 12
    file.unlink()
    assert "no answer found in 6" in told(capsys, "score", page.parent)
    assert page.read_text().count("<img") == 0 and "Pictures are not shown" in page.read_text() and "no idea" in page.read_text()


def test_what_vlmevalkit_cannot_score_in_one_file_is_refused(rows, tmp_path, capsys):
    both = rows.parent / "both.jsonl"
    row = json.loads(rows.read_text().splitlines()[0])
    row |= {"truth": "12", "choices": [], "id": "open", "messages": [{"role": "user", "content": "<image><image>How many?"}]}
    both.write_text(rows.read_text() + json.dumps(row) + "\n")
    assert "open questions beside others" in refused(capsys, "bench", "export", both, "-o", tmp_path / "x.tsv")


def test_a_quiz_holds_no_answers_and_what_people_download_is_scored(rows, tmp_path, capsys):
    assert "quiz.html: 4 questions" in told(capsys, "bench", "quiz", rows, "-o", tmp_path / "quiz", "--count", 4, "--seed", 1)
    page = (tmp_path / "quiz" / "quiz.html").read_text()
    known = json.loads(re.search(r'id="quiz">(.*?)</script>', page).group(1))
    items = {item.id: item for item in open_set(str(rows)).items}
    assert len(known["ids"]) == 4 and page.count("<article") == 4 and page.count("data:image/png") == 8
    assert '"answer"' not in page and all(f"A. {items[name].options[0]}" in page for name in known["ids"])
    answers = {name: items[name].answer for name in known["ids"][:3]}  # the last is left open
    file = tmp_path / "answers-ada.json"
    file.write_text(json.dumps({"quiz": known["digest"], "set": known["set"], "who": "Ada L.", "answers": answers, "seconds": {}}))
    text = told(capsys, "score", file, "--quiz", tmp_path / "quiz", "-o", tmp_path / "out", "--json", tmp_path / "ada.json")
    (result,) = json.loads((tmp_path / "ada.json").read_text())["results"]
    assert accuracy(result) == 0.75 and result["missing"] == 1 and result["model"] == "Ada L."
    assert "1 without a reply, counted as wrong" in text and (tmp_path / "out" / result["set"].replace("/", "-") / "human-Ada-L").is_dir()
    file.write_text(file.read_text().replace(known["digest"], "another"))
    assert "answers to the quiz another" in refused(capsys, "score", file, "--quiz", tmp_path / "quiz")
    assert "no quiz.json" in refused(capsys, "score", file)


def test_the_sets_are_listed_and_a_missing_one_says_where_it_is_published(capsys, lab, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    listed = told(capsys, "bench", "--list")
    assert re.search(r"^blink +BLINK: https://", listed, re.M) and re.search(r"^mmsi-circular ", listed, re.M)
    error = refused(capsys, "bench", "blink", "--model", lab.model)
    assert "https://huggingface.co/datasets/BLINK-Benchmark/BLINK" in error


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "name at least one set"),
        (["ROWS"], "--model M is missing"),
        (["ROWS", "--model", "no/such/folder"], "no such folder"),
        (["ROWS", "--model", "M", "--model", "M"], "two models are called"),
        (["ROWS", "--server", "http://localhost:1/v1", "--model", "m", "--dtype", "float32"], "dtype: is for the engine embedded or vllm"),
        (["ROWS", "--server", "http://localhost:1/v1", "--model", "m", "--engine", "vllm"], "one of them draws the replies"),
        (["ROWS", "--model", "M", "--judge", "http://localhost:1/v1"], "--judge and --judge-model"),
        (["ROWS", "--model", "M", "--limit", "-3"], "limit: must be at least 0"),
        (["nothing", "--model", "M"], "no benchmark 'nothing'"),
        (["--table", "paper", "OUT"], "no benchmark run in it"),
    ],
)
def test_mistakes_are_told_in_one_line(words, match, rows, lab, tmp_path, capsys):
    named = {"ROWS": str(rows), "M": str(lab.model), "OUT": str(tmp_path)}
    error = refused(capsys, "bench", *(named.get(word, word) for word in words))
    assert match in error and error.count("\n") == 1
