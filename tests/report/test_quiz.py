"""The quiz's page in a browser, where there is one, and pages with many pictures."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from actial_fast.report.errors import PICTURES, Looked, errors_page
from actial_fast.report.quiz import Asked, quiz_page
from tests.conftest import png

PICTURE = png(np.zeros((8, 8, 3), np.uint8))
DRIVE = """<script>{
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key: key, bubbles: true}));
press("b"); press("ArrowRight"); press("c"); press("ArrowLeft"); press("a"); press("Enter"); press("ArrowRight");
const line = document.querySelector("article:not([hidden]) input"); line.value = " 12 "; line.dispatchEvent(new Event("input"));
const who = document.getElementById("who"); who.value = "Ada L."; who.dispatchEvent(new Event("input"));
let saved; URL.createObjectURL = blob => { saved = blob; return "blob:"; };
HTMLAnchorElement.prototype.click = function () { document.title = this.download; };
document.getElementById("download").click();
saved.text().then(text => {
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = text;
  document.body.append(told);
});
}</script></body>"""


def quiz() -> str:
    choices = tuple((letter, letter, f"{letter}. <{letter.lower()}>") for letter in "ABC")
    asked = [Asked(f"q/{k}", f"Which & why {k}?", (PICTURE,), choices if k < 2 else ()) for k in range(3)]
    return quiz_page("A </script> quiz", "some", "digest", asked)


def test_what_questions_say_is_text_and_no_markup():
    page = quiz()
    assert "Which &amp; why 0?" in page and "A. &lt;a&gt;" in page and page.count("</script>") == 2
    assert json.loads(re.search(r'id="quiz">(.*?)</script>', page)[1])["ids"] == ["q/0", "q/1", "q/2"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_answers_are_chosen_by_letter_changed_and_downloaded(tmp_path):
    file = tmp_path / "quiz.html"
    file.write_text(quiz().replace("</body>", DRIVE))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=3000",
    ]
    page = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120).stdout
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', page, re.S)[1])
    assert told["answers"] == {"q/0": "A", "q/1": "C", "q/2": "12"} and told["who"] == "Ada L." and told["quiz"] == "digest"
    assert "<title>answers-Ada-L-.json</title>" in page and "question 3 of 3, 3 answered" in page


def test_a_videos_frames_do_not_fill_the_page_of_errors():
    looked = Looked("1", "a<b", "wrong", "q<", (PICTURE,) * 32, "A", "B", "letter", "</pre><script>")
    page = errors_page("t", "l", [looked])
    assert page.count("<img") == PICTURES and "every 4th of 32 pictures" in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page and 'data-category="a&lt;b"' in page
