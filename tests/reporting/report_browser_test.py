"""The report in a real browser: Chromium without a window, steered by its own driver."""

import shutil
from pathlib import Path

import pytest
from made_up_run import HOSTILE, write_probe, write_run

from distill.reporting.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
# As shown: marks that cannot be seen, or turn the text around, are spelt out.
SHOWN = HOSTILE
for mark in "\u202e\u2066\x1b":
    SHOWN = SHOWN.replace(mark, f"⟨U+{ord(mark):04X}⟩")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=1300,1400",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """A report that is open."""

    def __init__(self, browser, path: Path):
        self.browser = browser
        browser.get_log("browser")
        browser.get(path.as_uri())

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        (found,) = self.all(selector)
        return found

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def point_at(self, element) -> None:
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.browser).move_to_element(element).perform()

    def choose(self, text: str) -> None:
        (button,) = [b for b in self.all(".choice button") if b.text.startswith(text)]
        button.click()

    def prompts(self) -> list[str]:
        return [item.text for item in self.all(".item .snippet")]

    def focused(self):
        return self.browser.switch_to.active_element


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("browser") / "run")
    write_probe(folder, recovers=True)
    write_report([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def page(browser, report):
    opened = Page(browser, report)
    yield opened
    assert browser.get_log("browser") == []


def test_all_sections_are_drawn(page):
    assert [h.text for h in page.all("h2")] == [
        "Results", "Curves", "Both models on the student's own responses",
        "Responses, token by token", "Setup",
    ]  # fmt: skip
    assert "40.0% → 80.0%" in page.all(".tile")[0].text
    assert page.one(".verdict").text.startswith("The run helped: 40.0% before, 80.0% after")
    rows = [row.text.split()[0] for row in page.all(".results tbody tr")]
    assert rows == ["base", "student", "teacher"]
    titles = [title.text for title in page.all("figcaption b")]
    assert {"Held-out accuracy", "Training loss", "Throughput"} <= set(titles)
    assert page.all(".chart polygon") and page.all(".chart .error")  # the interval


def test_a_run_is_explained_by_its_own_responses(page):
    section = page.one("#explanation")
    assert [title.text for title in section.find_elements(By.CSS_SELECTOR, "figcaption b")] == [
        "Teacher's perplexity", "Where the loss is", "Off the teacher's path", "Entropy",
        "The 10 likeliest tokens",
    ]  # fmt: skip
    titles, tables = (section.find_elements(By.CSS_SELECTOR, x) for x in ("h3", ".scroll > table"))
    assert [title.text for title in titles] == [
        "Student and teacher on the model's own responses", "Leaving the teacher's path",
        "Share of the loss by kind of token", "Prompts with most of the loss", "The probe",
    ]  # fmt: skip
    rows = [row.text for row in tables[1].find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert rows == ["base 12.0% 50.0% 4.0% 2.0% 90.0%", "student 8.0% 50.0% 4.0% 2.0% 90.0%"]
    assert SHOWN in tables[3].get_property("textContent")
    assert SHOWN in section.find_elements(By.CSS_SELECTOR, ".lead")[-1].get_property("textContent")


def test_a_chart_is_a_table_too(page):
    chart = next(c for c in page.all(".chart") if "Off the teacher's path" in c.text)
    picture = chart.find_element(By.CSS_SELECTOR, "svg[tabindex]")
    assert "share of responses" in picture.get_attribute("aria-label")
    page.browser.execute_script("arguments[0].focus()", picture)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "token 1" in chart.text and "24%" in chart.text
    page.press(Keys.TAB, Keys.ENTER)  # to the values, and opens them
    found = WebDriverWait(chart, 5).until(lambda c: c.find_elements(By.CSS_SELECTOR, "tbody tr"))
    rows = [row.text for row in found]
    assert rows == ["0 12% 8%", "1 24% 16%"]
    assert len(chart.find_elements(By.CSS_SELECTOR, "thead th[scope=col]")) == 3
    page.press(Keys.ENTER, Keys.ENTER)
    assert len(chart.find_elements(By.CSS_SELECTOR, "table")) == 1


def test_a_phone_is_wide_enough(page):
    metrics = dict(width=340, height=700, deviceScaleFactor=2, mobile=True)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 340
        widths = [figure.rect["width"] for figure in page.all(".chart")]
        assert len(widths) > 5 and max(widths) <= 340 - 2 * 12
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_hostile_text_stays_text(page):
    assert page.browser.execute_script("return window.hacked") is None
    assert page.all("img") == [] and len(page.all("script")) == 2
    third = page.all(".token")[2]
    assert third.get_property("textContent") == SHOWN
    assert SHOWN in page.one(".prompt").get_property("textContent")
    assert SHOWN in page.one(".detail header code").get_property("textContent")
    assert SHOWN in page.one(".facts").get_property("textContent")
    page.point_at(third)
    assert SHOWN.replace(" ", "␣") in page.one("#tip").get_property("textContent")


def test_pointing_at_a_token_shows_both_models_choices(page):
    assert not page.one("#tip").is_displayed()
    page.point_at(page.all(".token")[0])
    tip = page.one("#tip")
    assert tip.is_displayed() and "divergence 0 nats" in tip.text
    rows = [row.text.split() for row in page.all("#tip tbody tr")]
    assert rows[0] == ["five", "←", "response", "70.0%", "90.0%"]
    assert rows[1][-2:] == ["20.0%", "5.0%"] and rows[2] == ["⏎", "1e-4", "6e-6"]
    # A token that is not among the teacher's choices has a row of its own.
    page.point_at(page.all(".token")[1])
    rows = [row.text for row in page.all("#tip tbody tr")]
    assert len(rows) == 4 and rows[3].startswith("␣and⏎ ← response")
    page.point_at(page.one("h1"))
    assert not page.one("#tip").is_displayed()


def test_colour_follows_the_divergence_and_an_underline_the_choice(page):
    heats = page.browser.execute_script(
        "return [...document.querySelectorAll('.token')]"
        ".map((token) => Number(token.style.getPropertyValue('--heat')))"
    )
    assert heats[2] == max(heats) == 1.0 and heats[3] == 0.0 and 0 < heats[4] < heats[1] < 1
    differs = ["differs" in token.get_attribute("class") for token in page.all(".token")]
    assert differs == [False, True, True, False, False]


def test_filters_order_and_models(page):
    assert len(page.prompts()) == 6
    page.choose("Wrong")
    assert [text.split()[1] for text in page.prompts()] == ["0", "1"]
    assert {m.text for m in page.all(".item .mark")} == {"✗"}
    page.choose("Base")
    assert len(page.prompts()) == 5  # the filter stays
    page.choose("Right")
    assert [text.split()[1] for text in page.prompts()] == ["5"]
    page.choose("All")
    page.choose("Largest first")
    assert [text.split()[1] for text in page.prompts()] == ["5", "4", "3", "2", "1", "0"]


def test_everything_by_keyboard(page):
    page.browser.execute_script("document.querySelector('.list').focus()")
    page.press(Keys.ARROW_DOWN, "j", "k")
    assert page.one("[role=option].item[aria-selected=true] .snippet").text.startswith("question 1")
    page.press(Keys.TAB)  # into the response
    assert page.focused().get_attribute("aria-label") == "five, 0.01 nats"
    assert page.one("#tip").is_displayed()
    page.press(Keys.ARROW_RIGHT)
    assert page.focused().text.strip() == "and⏎"
    page.press("n")  # the next token that diverges
    assert "1.5 nats" in page.focused().get_attribute("aria-label")
    assert "20.0%" in page.one("#tip tr.chosen").text
    assert page.focused().get_attribute("aria-describedby") == "tip"
    page.press(Keys.END, Keys.ARROW_RIGHT)
    assert page.focused().text == "é"
    page.press(Keys.ESCAPE)
    assert not page.one("#tip").is_displayed()
    page.press("f")
    assert len(page.prompts()) == 2
    page.press("b")
    assert len(page.prompts()) == 5


def test_curves_are_read_with_pointer_and_keys(page):
    chart = next(c for c in page.all(".chart") if "Training loss" in c.text)
    picture = chart.find_element(By.CSS_SELECTOR, "svg[tabindex]")
    page.browser.execute_script("arguments[0].focus()", picture)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "step 20" in chart.text and "0.05" in chart.text
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "step 40" in chart.text and "step 20" not in chart.text
    page.point_at(picture)  # its middle
    assert "step 20" in chart.text


CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const behind = (node) => {
  const layers = [];
  for (let n = node; n; n = n.parentElement) layers.unshift(getComputedStyle(n).backgroundColor);
  for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const node = arguments[0], under = light(behind(node));
canvas.fillStyle = getComputedStyle(node).color;
canvas.fillRect(0, 0, 1, 1);
const ink = light([...canvas.getImageData(0, 0, 1, 1).data]);
return [(Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05), under];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_in_light_and_dark(browser, tmp_path, scheme):
    """By the WCAG's measure of contrast, where the colour is strongest too."""
    write_report([write_run(tmp_path / "run", steps=20)], tmp_path / "report.html")
    page = Page(browser, tmp_path / "report.html")
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    _, under = page.browser.execute_script(CONTRAST, page.one("h1"))
    assert (under < 0.1) == (scheme == "dark")
    for selector in (".token:nth-child(3)", "h1", ".lead", ".snippet", ".results td", ".note"):
        contrast, _ = page.browser.execute_script(CONTRAST, page.all(selector)[0])
        assert contrast > 4.5, selector


def test_several_runs_one_of_them_unfinished(browser, report, tmp_path):
    other = write_run(tmp_path / "other", steps=20)
    write_report([report.parent, other], tmp_path / "both.html")
    page = Page(browser, tmp_path / "both.html")
    assert page.one("h1").text == "run · other"
    assert "other: Not finished: step 20 of 40" in page.one(".note").text
    assert len(page.all(".results tbody tr")) == 5
    assert [b.text for b in page.all(".choice:first-child button")] == [
        "run · Student, step 40", "run · Base", "other · Student, step 20", "other · Base",
    ]  # fmt: skip
    page.choose("other · Base")
    assert len(page.prompts()) == 6
    assert browser.get_log("browser") == []


def test_runs_with_and_without_a_teacher_are_explained_each(browser, report, tmp_path):
    other = write_run(tmp_path / "other", has_teacher=False)
    write_report([report.parent, other], tmp_path / "both.html")
    page = Page(browser, tmp_path / "both.html")
    for label, words in (("other · Base", "surprise"), ("run · Base", "divergence")):
        page.choose(label)
        assert words in page.one("#rollouts .lead").text
        assert page.one(".heat-legend").text.endswith(f"of {words}")
    assert browser.get_log("browser") == []


def test_a_run_that_has_only_begun(browser, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    write_report([folder], tmp_path / "begun.html")
    page = Page(browser, tmp_path / "begun.html")
    assert page.one("h1").text == "begun" and len(page.all(".note")) == 2
    assert browser.get_log("browser") == []
