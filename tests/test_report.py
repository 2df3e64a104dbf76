"""The report of real files: complete, safe whatever a model said, light, and alive in a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
import report_folders

from saro_jax import report
from saro_jax.evaluation import results as evaluations
from saro_jax.evaluation.results import Step

EVIL = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
READY = "document.documentElement.dataset.ready === 'yes'"

needs_browser = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An evaluation in which one model answers with HTML, an analysis, two training runs."""
    root = tmp_path_factory.mktemp("runs")
    made = report_folders.transcripts(report_folders.MODELS, 120)
    place = next(i for i, one in enumerate(made) if one.benchmark == "sums" and one.steps)
    made[place] = made[place].model_copy(
        update={
            "prompt": f"needle {EVIL}",
            "answer": f"answer {EVIL}",
            "category": "=HYPERLINK(1)" + EVIL,
            "steps": (
                Step(text=f"First. {EVIL}\n\n", kind="understand"),
                Step(text="Wait, needlestep.", kind="reflect"),
            ),
        }
    )
    # Its twins are of the same prompt.
    made = [
        one.model_copy(update={"prompt": made[place].prompt, "category": made[place].category})
        if (one.benchmark, one.id) == (made[place].benchmark, made[place].id)
        else one
        for one in made
    ]
    report_folders.write_evaluation(root / "evaluation", made)
    results = evaluations.read_results(root / "evaluation")
    evil = results.benchmarks[0].model_copy(update={"protocol": EVIL, "title": "XSTest " + EVIL})
    evaluations.write_results(
        root / "evaluation",
        results.model_copy(update={"benchmarks": (evil, *results.benchmarks[1:])}),
    )
    report_folders.write_training(root / "rw", "rw")
    report_folders.write_training(root / "srpo", "srpo")
    report_folders.write_analysis(root / "analysis")
    return root


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory) -> Path:
    return report.run([folder], tmp_path_factory.mktemp("report"))


class Tags(HTMLParser):
    """Elements of a page in their order, and whether they were closed as they should be."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.starts.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "br", "img", "input", "link", "hr"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.starts.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def tags(page: Path) -> Tags:
    parser = Tags()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_the_page_is_well_formed_and_what_was_injected_is_text(page: Path):
    found = tags(page)
    assert found.wrong == [] and found.stack == []
    assert [name for name, _ in found.starts].count("script") == 2
    assert not any(name == "img" for name, _ in found.starts)
    assert not any(key.startswith("on") or key == "style" for _, at in found.starts for key in at)
    assert "window.pwned" in page.read_text()  # escaped, as the protocol of a benchmark


def test_nothing_is_loaded_and_only_the_page_s_own_script_may_run(page: Path):
    text = page.read_text(encoding="utf-8")
    found = tags(page)
    assert not any({"src", "srcset", "action", "data"} & set(at) for _, at in found.starts)
    assert all(at["href"].startswith("#") for _, at in found.starts if at.get("href"))
    policy = next(at["content"] for _, at in found.starts if "http-equiv" in at)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    for tag in ("style", "script"):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        (body,) = body
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_tables_have_scopes_and_links_their_targets(page: Path):
    found = tags(page)
    assert all(at.get("scope") in ("col", "row") for name, at in found.starts if name == "th")
    ids = [at["id"] for _, at in found.starts if "id" in at]
    assert len(ids) == len(set(ids))
    links = {at["href"][1:] for _, at in found.starts if at.get("href")}
    assert links <= set(ids)
    assert {"summary", "cost", "categories", "training", "embedding", "transcripts"} <= links
    for name, at in found.starts:
        if name == "svg" and at.get("aria-hidden") is None:
            assert at["role"] == "img" and at["aria-label"]


def test_the_same_folders_give_the_same_files(folder: Path, page: Path, tmp_path: Path):
    again = report.run([folder], tmp_path)
    files = sorted(one.relative_to(tmp_path) for one in tmp_path.rglob("*") if one.is_file())
    assert len(files) > 8
    for one in files:
        assert (tmp_path / one).read_bytes() == (page.parent / one).read_bytes(), one
    assert again.name == "index.html"


def test_markdown_and_csv_hold_no_markup_and_no_formula(page: Path):
    text = (page.parent / "report.md").read_text(encoding="utf-8")
    assert "55" in text or "%" in text
    assert "<script" not in text.replace("\\<script", "")
    sheet = (page.parent / "csv" / "transcripts.csv").read_text(encoding="utf-8")
    assert "'=HYPERLINK(1)" in sheet and ",=HYPERLINK" not in sheet
    assert "needlestep" not in sheet  # no texts


def test_the_command_line(folder: Path, tmp_path: Path, capsys):
    names = [str(folder / name) for name in ("evaluation", "rw")]
    code = report.main([*names, "--out", str(tmp_path / "r"), "--title=A & B", "--transcripts=3"])
    assert code == 0
    assert str(tmp_path / "r" / "index.html") in capsys.readouterr().out
    text = (tmp_path / "r" / "index.html").read_text()
    assert "<h1>A &amp; B</h1>" in text and "27 of 360 transcripts" in text
    assert "No analysis was given" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out=x"], "RUN: name at least one folder"),
        (["nowhere", "--out=x"], "nowhere: no such folder"),
        (["nowhere"], "--out: required"),
        (["--outt=x", "y"], "--outt: unknown option"),
        (["y", "--out=x", "--transcripts=-1"], "--transcripts=-1; allowed: >= 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_training_run_alone_makes_a_page(folder: Path, tmp_path: Path):
    text = report.run([folder / "srpo"], tmp_path).read_text()
    assert "No evaluation was given" in text and "Reward margin" in text
    assert "Answers: refused" in text and "harmful from 0.354 to 0.855" in text
    assert 'id="packed"' not in text


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as one:
        yield one


def count(browser) -> str:
    return browser.evaluate("document.getElementById('count').textContent")


def choose(browser, **filters: str) -> str:
    """Sets filters as a user would, after clearing all; what the page then says it shows."""
    browser.evaluate("document.getElementById('filters').reset()")
    for name, value in filters.items():
        browser.evaluate(
            f"(f => {{ f.value = {json.dumps(value)}; f.dispatchEvent(new Event("
            f"f.id === 'f-text' ? 'input' : 'change')) }})(document.getElementById('f-{name}'))"
        )
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    return count(browser)


@needs_browser
def test_an_injected_script_stays_text(browser, page: Path):
    browser.errors.clear()
    browser.open(page, READY)
    assert choose(browser, text="needlestep").startswith("1 of ")
    browser.evaluate("document.querySelectorAll('.item').forEach(one => { one.open = true })")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    said = browser.evaluate("document.getElementById('list').textContent")
    assert said.count(EVIL) >= 3  # prompt, a step, answer
    assert browser.evaluate("window.pwned === undefined")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelectorAll('.steps .reflect').length") >= 1
    assert browser.errors == []
    with pytest.raises(RuntimeError, match=r"TrustedHTML|Uncaught"):
        browser.evaluate("document.body.innerHTML = '<b>x</b>'")
    browser.errors.clear()


@needs_browser
def test_filters_show_what_they_say(browser, page: Path, folder: Path):
    browser.errors.clear()
    browser.open(page, READY)
    made = [
        one
        for parts in evaluations.transcript_files(folder / "evaluation")
        for one in evaluations.read_transcripts(folder / "evaluation", *parts)
    ]

    def expected(chosen) -> str:
        prompts = len({(one.benchmark, one.id) for one in chosen})
        return f"{prompts} of 120 prompts, {len(chosen)} transcripts"

    assert count(browser) == expected(made)
    assert choose(browser, kind="jailbreak") == expected([t for t in made if t.kind == "jailbreak"])
    both = [t for t in made if t.outcome == "refused" and t.model == "srpo"]
    assert choose(browser, outcome="refused", model="2") == expected(both)
    unsafe = [t for t in made if any(v.label == "unsafe" for v in t.verdicts)]
    assert choose(browser, verdict="unsafe") == expected(unsafe)
    reflects = [t for t in made if any(s.kind == "reflect" for s in t.steps)]
    assert choose(browser, verdict="reflects") == expected(reflects)
    assert choose(browser, text="no such words") == "No transcript matches these filters."
    assert browser.evaluate("document.querySelectorAll('.item').length") == 0
    differ = choose(browser, compare="differ")
    outcomes: dict = {}
    for one in made:
        outcomes.setdefault((one.benchmark, one.id), set()).add((one.outcome, one.correct))
    assert differ.startswith(f"{sum(len(found) > 1 for found in outcomes.values())} of ")
    assert choose(browser) == expected(made)
    assert browser.evaluate("document.querySelectorAll('.item').length") == 20
    browser.evaluate("document.getElementById('after').click()")
    assert browser.evaluate("document.getElementById('page').textContent") == "Page 2 of 6"
    assert browser.errors == []


@needs_browser
def test_harmful_text_is_collapsed_until_asked_for(browser, page: Path):
    browser.open(page, READY)
    choose(browser, kind="harmful", model="0")
    texts = "[...document.querySelectorAll('.item .preview')].map(one => one.textContent)"
    assert set(browser.evaluate(texts)) == {"harmful prompt, hidden"}
    browser.evaluate("document.querySelector('.item').open = true")
    browser.wait("document.querySelector('.item[open] .panel') !== null", 2)
    closed = "[...document.querySelectorAll('.open details')].every(one => !one.open)"
    assert browser.evaluate(closed)
    browser.evaluate("document.getElementById('f-open').click()")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert "harmful prompt, hidden" not in browser.evaluate(texts)
    browser.evaluate("document.querySelector('.item').open = true")
    browser.wait("document.querySelector('.item[open] .panel') !== null", 2)
    assert browser.evaluate("document.querySelector('.open details').open")


@needs_browser
def test_keys_alone_reach_and_open_a_transcript(browser, page: Path):
    browser.open(page, READY)
    browser.key("Tab", 9)
    assert browser.evaluate("document.activeElement.className") == "skip"
    browser.evaluate("document.getElementById('f-text').focus()")
    for _ in range(30):
        browser.key("Tab", 9)
        if browser.evaluate("document.activeElement.matches('.item > summary')"):
            break
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.key("Enter", 13)
    browser.wait("document.querySelector('.item[open] .panel') !== null", 2)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_is_legible_in_both_schemes_and_the_phone_does_not_scroll_sideways(
    browser, page: Path, dark: bool
):
    browser.dark(dark)
    browser.size(390, 844)
    browser.open(page, READY)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.evaluate(CONTRAST) == []
    browser.size(1280, 900)
    browser.dark(False)


@needs_browser
def test_many_models_with_long_names_and_texts_stay_within_the_phone(browser, tmp_path: Path):
    names = ["base", *(f"a-model-with-quite-a-long-name-indeed-{i}" for i in range(9))]
    made = [
        one.model_copy(update={"prompt": "x" * 500, "answer": one.answer and "y" * 900})
        for one in report_folders.transcripts(names, 30)
    ]
    report_folders.write_evaluation(tmp_path / "e", made)
    browser.size(390, 844)
    browser.errors.clear()
    browser.open(report.run([tmp_path / "e"], tmp_path / "report"), READY)
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    browser.wait("document.querySelector('.item[open] .panel') !== null", 2)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    chips = "document.querySelector('.item .chips').textContent"
    assert "as wanted" in browser.evaluate(chips) or "not" in browser.evaluate(chips)
    assert browser.errors == []
    browser.size(1280, 900)


# WCAG 2's contrast of every text with the first opaque colour behind it; those below AA.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map(
    (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    const colour = rgba(getComputedStyle(node).backgroundColor);
    if (colour[3] === 255) return colour;
    const below = node.parentElement ? behind(node.parentElement) : [255, 255, 255, 255];
    return below.map((v, i) => i < 3 ? v + (colour[i] - v) * colour[3] / 255 : 255);
  };
  const low = new Set();
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const unseen = ['SCRIPT', 'NOSCRIPT', 'STYLE', 'TITLE', 'DESC'];
    if (!own || unseen.includes(node.tagName.toUpperCase())) continue;
    if (!node.getClientRects().length || node.matches(':disabled')) continue;
    const style = getComputedStyle(node), svg = node.namespaceURI.endsWith('svg');
    const [a, b] = [light(rgba(svg ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.add(`${node.tagName}.${node.getAttribute('class')} ${ratio.toFixed(2)}`);
  }
  return [...low];
})()"""


@needs_browser
@pytest.mark.slow
def test_three_models_of_a_thousand_prompts_are_light_and_open_fast(browser, tmp_path: Path):
    report_folders.write_evaluation(
        tmp_path / "e", report_folders.transcripts(report_folders.MODELS, 1000)
    )
    page = report.run([tmp_path / "e"], tmp_path / "report")
    assert page.stat().st_size < 6e6
    browser.errors.clear()
    # The best of three: what else the machine does is not the page's weight.
    assert min(browser.open(page, READY) for _ in range(3)) < 2
    assert count(browser) == "1,000 of 1,000 prompts, 3,000 transcripts"
    assert browser.errors == []
