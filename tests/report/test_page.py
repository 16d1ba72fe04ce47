"""The report as people open it: in a real browser, without a network, with whatever a model may have written."""

import math
import tempfile
import time
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

import axe_core_python
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from rlhf.errors import RequestError
from rlhf.history.diagnosis import Figures, in_words, symptoms
from rlhf.report import charts
from rlhf.report.graph import connections, layers
from rlhf.report.page import LONGEST, content, rendered, shown_text, vega, write_report
from rlhf.store import Store
from tests.browser import chromium
from tests.pipeline.helpers import load_toy, make, planned, until, write_pipeline

HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">\u2028&amp;"
    "\x1b[2J\ud800\u202e"
)
STRANGE = ("\x1b[2J\x00", "\u202eright to left שלום", "👩\u200d👩\u200d👧", "x" * 100_000, HOSTILE)
AXE = Path(axe_core_python.__file__).parent / "axe.min.js"


@cache
def script() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return vega(Path(folder))


def iterations(count: int) -> list[dict[str, Any]]:
    names = ("objective/scores", "objective/kl", "length/mean", "policy/entropy_avg", "score/out_of_range")
    return [{"step": step, "val/num_eos_tokens": 8} | dict.fromkeys(names, 0.01 * step) for step in range(1, count + 1)]


def page(count: int, samples: list[dict[str, Any]], name: str = "a pipeline") -> str:
    rows = iterations(count)
    rows[0]["objective/kl"] = math.nan
    figures = Figures(iterations=rows, settings={"rollouts": 8, "kl": {"coef": 0.1}})
    found = symptoms(figures)
    marks = [{"alarm": name, "from": 2, "to": 3, "text": name}]
    bins = [{"predicted": share, "observed": share, "comparisons": 9} for share in (0.5, 0.9)]
    parts = [
        {"title": "Curves", "text": name, "spec": charts.lines(rows, "step", {"objective/scores": "score"}, marks)},
        {"title": "Reward against KL", "text": name, "spec": charts.frontier({"before": rows, "r" * 80: rows})},
        {
            "title": "Gap",
            "text": name,
            "spec": charts.bars([{"a": name, "b": 0.5, "low": 0.4, "high": 0.6}], "a", "b", "a", "b"),
        },
        {
            "title": "Judge",
            "text": name,
            "spec": charts.intervals([{"name": name, "value": 1, "low": 0, "high": 2}], "a"),
        },
        {"title": "Calibration", "text": name, "spec": charts.calibration(bins)},
        {"title": "Notes", "notes": [name]},
        {"title": "Table", "header": ("a", "b"), "rows": [[name, "b" * 400]]},
    ]
    stages = {"data": [], "model": [], "sft": ["data", "model"], "ppo": ["data", "sft"], name: ["data", "ppo"]}
    columns = layers(stages)
    texts = dict.fromkeys(("uses", "why", "cost", "progress", "failed"), name) | {"state": "failed"}
    boxes = {stage: texts | {"name": stage, "sources": read, "feeds": [name]} for stage, read in stages.items()}
    graph = {
        "columns": [[boxes.get(item, {"lane": item}) for item in column] for column in columns],
        "paths": connections(stages, columns),
    }
    lineage = {"rows": [[name] * 8], "cost": name, "versions": {"Python": name}}
    return rendered(
        {
            "pipeline": name,
            "store": name,
            "words": in_words(figures, found),
            "method": figures.method,
            "symptoms": found,
            "graph": graph,
            "sections": [{"name": name, "parts": parts}],
            "changes": [{"stage": name, "before": name, "changes": [name], "figures": [[name, "1", "2", "+1"]]}],
            "lineage": lineage,
            "samples": samples,
            "damaged": 1,
        },
        script(),
    )


def sample(step: int, number: int, text: str = "fine") -> dict[str, Any]:
    tokens = [[text, 0.5, -1.0], ["", 0.1, 0.3]]
    texts = {"prompt": f"{text} {number % 3}", "response": text, "watched": number % 3 == 0}
    return {"stage": "ppo", "step": step, "score": float(number), "ended": number % 2 == 0, "tokens": tokens} | texts


@pytest.fixture(scope="module")
def browser() -> Generator[webdriver.Chrome]:
    driver = chromium()
    yield driver
    driver.quit()


def opened(browser: webdriver.Chrome, file: Path, text: str) -> float:
    """Open a page; return the seconds until its scripts have run."""
    file.write_text(text, encoding="utf-8")
    start = time.monotonic()
    browser.get(file.as_uri())
    seconds = time.monotonic() - start
    assert not errors_of(browser)
    return seconds


def errors_of(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def shown(browser: webdriver.Chrome) -> list[str]:
    return [card.text for card in browser.find_elements(By.CSS_SELECTOR, ".sample")]


def size(browser: webdriver.Chrome, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_read_by_everybody(browser: webdriver.Chrome, tmp_path: Path, scheme: str) -> None:
    """axe finds nothing, in the light and in the dark; a telephone need not be moved sideways; nothing runs."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size(browser, 360)
    rows = [sample(1, number, text) for number, text in enumerate(STRANGE)]
    opened(browser, tmp_path / "page.html", page(5, rows, HOSTILE))
    browser.execute_script("document.querySelector('.charts').scrollIntoView()")
    until(lambda: bool(browser.find_elements(By.CSS_SELECTOR, ".chart svg")), "a chart")
    browser.execute_script("document.querySelectorAll('.charts details').forEach((one) => { one.open = true })")
    until(lambda: not browser.find_elements(By.CSS_SELECTOR, ".charts details:not(:has(table))"), "tables")
    assert browser.execute_script("return document.title") != "owned"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text(encoding="utf-8")})
    found = browser.execute_async_script("axe.run().then(arguments[0])")
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]] == []
    size(browser, 1200)


def test_responses_are_found(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """By iteration, by a word in all iterations, the worst and best first, of one prompt through time, with colours."""
    rows = [
        sample(step, number, "rare" if (step, number) == (1, 2) else "fine") for step in (1, 2) for number in range(4)
    ]
    rows += [sample(2, 0) | {"finished": True, "tokens": [["fine", 0.5], ["", 0.1]]}]
    rows.append({"stage": "evaluate", "score": 1.0, "score_before": 0.5, "prompt": "p", "before": "b", "response": "a"})
    opened(browser, tmp_path / "page.html", page(2, rows))
    assert len(shown(browser)) == 4
    assert all("iteration 2" in text for text in shown(browser))
    set_to = "const [name, value] = arguments; const it = document.getElementById(name); it.value = value;"
    set_to += " it.dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(set_to, "order", "best")
    assert [text.split()[0] for text in shown(browser)] == ["+3.00", "+2.00", "+1.00", "+0.00"]
    browser.execute_script(set_to, "search", "RARE")
    (only,) = shown(browser)
    assert "iteration 1" in only
    browser.execute_script(set_to, "search", "")
    browser.execute_script(set_to, "order", "")
    browser.execute_script(set_to, "prompt", "fine 0")
    assert ["iteration 1" in text for text in shown(browser)] == [True, True, False, False, False]
    browser.execute_script(set_to, "prompt", "")
    browser.execute_script(set_to, "step", "2")
    browser.execute_script(set_to, "colour", "2")
    (finished,) = shown(browser)
    assert "after the last update" in finished
    assert "no advantages" in finished
    browser.execute_script(set_to, "step", "3")
    (evaluated,) = shown(browser)
    assert "before (+0.50): b" in evaluated
    browser.execute_script(set_to, "prompt", "fine 0")
    browser.execute_script(set_to, "colour", "1")
    (first, *_) = browser.find_elements(By.CSS_SELECTOR, ".sample span[title]")
    assert (first.text, first.get_attribute("title")) == ("fine", "0.5")


def test_charts_are_drawn_of_any_text_and_have_their_figures_as_tables(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    """Those of the chart itself, also where alarms, intervals or a diagonal are drawn with it."""
    opened(browser, tmp_path / "page.html", page(5, [], HOSTILE))
    for chart in browser.find_elements(By.CSS_SELECTOR, ".chart"):
        browser.execute_script("arguments[0].scrollIntoView()", chart)
        until(lambda chart=chart: bool(chart.find_elements(By.CSS_SELECTOR, "svg")), "a chart")
    assert not errors_of(browser)
    read = "return [...document.querySelectorAll('.charts details')].map(one => { one.open = true; return one })"
    until(
        lambda: len(browser.execute_script(read)) == len(browser.find_elements(By.CSS_SELECTOR, "table.figures")),
        "tables",
    )
    heads = [table.text.split("\n")[0] for table in browser.find_elements(By.CSS_SELECTOR, "table.figures thead")]
    assert heads == [
        "x y",
        "run kl score iteration",
        "a b low high",
        "place name value low high",
        "predicted observed comparisons",
    ]


def test_a_long_run_opens_at_once(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """500 iterations with 4,000 responses: under 5 MB, and opened in seconds on a busy machine."""
    rows = [
        sample(step, number, "a response of some words, as they are") for step in range(1, 501) for number in range(8)
    ]
    text = page(500, rows)
    assert len(text.encode()) < 5e6
    assert opened(browser, tmp_path / "page.html", text) < 10
    assert len(shown(browser)) == 8


def test_a_pipeline_that_never_ran_has_no_report_and_half_of_one_has(tmp_path: Path) -> None:
    """With what to do next; stages without a result are shown with their state, damaged lines counted."""
    path = write_pipeline(tmp_path)
    config, store = load_toy(path), Store.open(tmp_path / "store")
    with pytest.raises(RequestError, match="nothing has run yet"):
        write_report(config, planned(path), store, tmp_path / "none.html")
    make(path, only="words")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written"):
        write_report(config, planned(path), store, tmp_path / "file" / "page.html")
    with pytest.raises(RequestError, match="is no report"):
        write_report(config, planned(path), store, path)
    attempt = store.new_attempt(str(planned(path)["count"].key))
    (attempt / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    (attempt / "samples.jsonl").write_text("")
    out = tmp_path / "reports" / "half.html"
    for _ in range(2):  # a report may be replaced
        write_report(config, planned(path), store, out)
    found = content(config, {}, store)
    assert found["graph"] == {"columns": [], "paths": []}
    text = out.read_text(encoding="utf-8")
    assert "1 damaged lines" in text
    assert [file.suffix for file in (store.root / "reports").iterdir()] == [".js"]
    assert ">done<" in text
    assert ">missing<" in text or ">blocked<" in text


def test_texts_are_cut_and_have_no_control_characters() -> None:
    """So that a page stays small, and shows the same everywhere."""
    assert shown_text("x" * 100_000) == "x" * LONGEST + "…"
    assert shown_text("a\x00b\n\tc\ud800\u202ed") == "a\ufffdb\n\tc\ufffd\ufffdd"
