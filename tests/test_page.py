"""The page of a batch: what it says, that it needs nothing else, and that a browser runs it."""

import base64
import html.parser
import io
import re
import shutil
import subprocess

import pytest
from PIL import Image

from ses_fast.batch import summarised
from ses_fast.folder import Result
from ses_fast.page import curve, picture_side, shown, write_page

EVIL = """</p></script><script>document.title="owned"</script><img src=x onerror='document.title="owned"'>&amp; "'"""
VOID = {"meta", "img", "input", "br", "hr", "link"}


def done(id, prompt, base, answer, **more):
    result = Result(id=id, prompt=prompt, status="done", seed=3, base_score=base, score=answer, **more)
    names = {name: f"images/{result.stem}{end}" for name, end in (("image", ".png"), ("base_image", ".base.png"))}
    return Result(**vars(result) | names)


RESULTS = [
    done("a", "two red squares", 10.0, 12.5, scores=[10.0, None, 12.5, 11.0], evaluations=4, seconds={"total": 3.0}),
    done("b", f"blue rings {EVIL}", 14.0, 14.0, columns={EVIL: EVIL}, held_out={EVIL: {"base": 1.0, "answer": 0.5}}),
    done("c", "a castle\nby the sea\x00\x1b[31m\u202e " + "very " * 20_000, None, 20.0, negative_prompt=EVIL),
    Result(id="d", prompt="a red fox", status="failed", seed=3, error=f"ValueError: {EVIL}", traceback=EVIL),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The path of a page, with its folder's images."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "images").mkdir()
    for i, result in enumerate(RESULTS[:2]):
        Image.new("RGB", (640, 320), (200, 30 * i, 0)).save(folder / result.base_image)
        Image.new("RGB", (640, 320), (0, 30 * i, 200)).save(folder / result.image)
    (folder / RESULTS[2].image).write_bytes(b"no picture")
    write_page(folder / "index.html", folder, RESULTS, summarised(RESULTS))
    return folder / "index.html"


class Reader(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the text of each article; checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.articles = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.articles.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "article" in self.open:
            self.articles[-1] += data


@pytest.fixture(scope="module")
def tags(page):
    reader = Reader()
    reader.feed(page.read_text())
    reader.close()
    assert reader.open == []
    return reader


def test_it_is_one_file_that_needs_no_other(tags):
    names = [name for name, _ in tags.tags]
    assert names.count("script") == names.count("style") == 1 and not {"link", "iframe", "object", "base"} & set(names)
    for _, attributes in tags.tags:
        assert not any(attribute.startswith("on") for attribute in attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert re.fullmatch(r"images/[a-z0-9_.-]+\.png", attributes.get("href", "images/a.png"))
    policy = next(attributes["content"] for _, attributes in tags.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_base_and_answer_stand_side_by_side(tags):
    pictures = [attributes for name, attributes in tags.tags if name == "img"]
    assert [each["alt"] for each in pictures] == ["without search", "with search"] * 2
    colours = []
    for each in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(each["src"].partition(",")[2])))
        assert image.size == (320, 160)
        colours.append("red" if image.getpixel((5, 5))[0] > 150 else "blue")
    assert colours == ["red", "blue"] * 2
    assert (
        "the picture cannot be read" in tags.articles[2] and "10.00" in tags.articles[0] and "12.50" in tags.articles[0]
    )


def test_texts_are_shown_as_they_are(tags):
    assert tags.articles[1].count(EVIL) == 2  # prompt and column; names of columns and rewards are cut
    assert tags.articles[1].count(EVIL[:80]) == 4
    assert f"ValueError: {EVIL}" in tags.articles[3]
    text = tags.articles[2]
    assert (
        "a castle\nby the sea\ufffd\ufffd[31m\ufffd very" in text
        and f"({len(RESULTS[2].prompt):,} characters)" in text
        and len(text) < 2000
    )
    assert not re.search("[\x00-\x08\x1b\u202e]", text)


def test_the_head_says_the_means(page):
    table = re.sub(r"<[^>]*>", " ", page.read_text().partition("<table>")[2].partition("</table>")[0])
    assert "the search's own" in table.replace("&#39;", "'") and re.search(r"12\.00\s+13\.25\s+\+1\.25\s+2", table)
    assert re.search(r"1\.00\s+0\.50\s+-0\.50\s+1", table)


@pytest.mark.parametrize("text, expected", [("a\tb\nc", "a\tb\nc"), ("\0\x07\x9b", "\ufffd" * 3), ("é狐🦊", "é狐🦊")])
def test_shown(text, expected):
    assert shown(text) == expected


def test_the_curve():
    drawn = curve([1.0, None, 3.0, 2.0, 5.0])
    assert drawn["dots"] == "M4 76h0M120 40h0M178 58h0M236 4h0"
    assert drawn["best"] == "M4 76H120V40H236V4H236" and (drawn["low"], drawn["high"]) == (1.0, 5.0)
    raced = curve([1.0, None, 3.0, 2.0, 5.0], {4})
    assert raced["best"] == "M4 76H120V40H236" and (raced["dots"], raced["pale"]) == (
        "M4 76h0M120 40h0M178 58h0",
        "M236 4h0",
    )
    assert curve([1.0, 2.0], {0, 1})["best"] == ""
    assert curve([None, 2.0, 2.0])["best"] == "M120 76H236"  # all alike: one line
    assert curve([]) is None and curve([None, 1.0]) is None


@pytest.mark.parametrize("prompts, side", [(0, 320), (1, 320), (500, 320), (2000, 173), (10_000, 77), (10**6, 64)])
def test_many_prompts_have_small_pictures(prompts, side):
    assert picture_side(prompts) == side


# ---------------------------------------------------------------- in a browser

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# What a person would do, and what then stands on the page, as the title.
USE = """
const said = [document.title];
const shown = () => cards.filter(card => !card.hidden).map(card => card.dataset.number).join("");
const order = () => [...list.children].map(card => card.dataset.number).join("");
function type(text) { search.value = text; search.dispatchEvent(new Event("input")); return shown(); }
function choose(name) { sort.value = name; sort.dispatchEvent(new Event("change")); return order(); }
said.push(shown(), type("RED"), type("red squares"), type("red nothing"), document.getElementById("count").textContent);
said.push(type("owned valueerror"), type(""));
for (const option of sort.options) said.push(option.value + choose(option.value));
said.push([...document.images].every(image => image.loading === "lazy" || image.complete));
document.body.textContent = said.join("|");
"""
USED = "4 prompts, with and without search|0123|03|0||0 of 4|3|0123|" + (
    "number0123|gain0123|loss1023|score2103|base0123|failed3012|true"
)


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: {', '.join(BROWSERS)}")
    return [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]


def test_a_browser_searches_and_sorts(browser, page, tmp_path):
    used = tmp_path / "used.html"
    used.write_text(page.read_text().replace("</script>", f"{USE}</script>", 1))
    done = subprocess.run([*browser, "--dump-dom", used.as_uri()], capture_output=True, text=True, timeout=300)
    assert re.search(r"<body>([^<]*)", done.stdout)[1].strip() == USED, done.stderr


def test_a_browser_shows_it(browser, page, tmp_path):
    """The first prompt's pictures stand beside each other, red on the left and blue on the right."""
    picture = tmp_path / "page.png"
    command = [*browser, "--window-size=1180,900", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    seen = Image.open(picture).convert("RGB")
    columns = {"red": [], "blue": []}
    for x in range(0, seen.width, 4):
        for y in range(200, 500, 4):
            r, g, b = seen.getpixel((x, y))
            if max(r, b) > 180 and min(r, b) < 30 and g < 30:
                columns["red" if r > b else "blue"].append(x)
    assert len(columns["red"]) > 1000 and len(columns["blue"]) > 1000
    assert max(columns["red"]) < min(columns["blue"])
