"""People at the page: real browsers, with keys and mouse."""

import re
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from rlhf.data.records import ComparisonSet, parse_record
from tests.browser import chromium
from tests.collect.program import read_lines, running, write_rows
from tests.pipeline.helpers import until

SCRIPT = "<script>document.title = 'owned'</script><b>bold</b>"
IMAGE = "<img src=x onerror=\"document.title = 'owned'\"> &amp;"
ROWS: list[dict[str, Any]] = [
    {"prompt": "by keys", "responses": ["a0", "b0", "c0"], "models": ["x", "y", "z"]},
    {"prompt": f"by drag {SCRIPT}", "responses": [SCRIPT, IMAGE, "c1"]},
    {"prompt": [{"role": "user", "content": "tied"}], "responses": ["a2", "b2", "c2"]},
    {"prompt": "skipped", "responses": ["a3", "b3"]},
    {"prompt": "last", "responses": ["a4", ""]},
]


class Browser:
    """A browser at the page, for one person."""

    def __init__(self) -> None:
        self.driver = chromium()

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def keys(self, *keys: str) -> None:
        """As somebody types who has not looked where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def shows(self, text: str, busy: str = "false") -> None:
        """Wait until the page shows a text, and has (or waits for) what it asked the server for."""

        def ready() -> bool:
            body = self.one("body")
            return text in body.text and body.get_attribute("aria-busy") == busy

        until(ready, f"the page with {text!r}", 20)

    @property
    def responses(self) -> list[str]:
        return [card.text for card in self.all(".card > .text")]

    def places(self, place_of: Callable[[str], int]) -> str:
        """The digits that give the responses these places, in the order of the page."""
        return "".join(str(place_of(text)) for text in self.responses)

    def chip(self, response: str) -> WebElement:
        return self.one(f'.chip[data-position="{self.responses.index(response)}"]')

    def drag(self, source: WebElement, target: str) -> None:
        ActionChains(self.driver, 20).drag_and_drop(source, self.one(f'[data-drop="{target}"]')).perform()

    def rungs(self) -> list[list[str]]:
        """The responses in each place."""
        return [
            [
                self.responses[int(chip.get_attribute("data-position") or "")]
                for chip in rung.find_elements(By.CSS_SELECTOR, ".chip")
            ]
            for rung in self.all(".rung")
        ]

    def sign_in(self, name: str) -> None:
        self.one("#name").send_keys(name, Keys.ENTER)


@pytest.fixture
def browsers() -> Generator[list[Browser]]:
    """Two browsers of two people."""
    found: list[Browser] = []
    try:
        found = [Browser(), Browser()]
        yield found
    finally:
        for browser in found:
            browser.driver.quit()


def test_two_people_rank_by_keys_and_by_drag_and_a_death_of_the_server_costs_them_nothing(
    browsers: list[Browser], tmp_path: Path
):
    """Ties, skips, undo, a reload in the middle, markup that stays text; and the result is what they said."""
    ann, bob = browsers
    sets, out = write_rows(tmp_path / "sets.jsonl", ROWS), tmp_path / "out.jsonl"
    with running(sets, out) as program:
        for browser, name in ((ann, "Ann"), (bob, "bob")):
            browser.driver.get(program.address)
            browser.sign_in(name)
            browser.shows("by keys")
        assert "annotator=Ann" in ann.driver.current_url
        assert "0 done · 0 skipped · 5 left" in ann.one("#counts").text

        # By keys: a digit for each response in turn.
        assert not ann.one("#submit").is_enabled()
        ann.keys(ann.places(lambda text: {"a0": 2, "b0": 1, "c0": 3}[text]))
        assert ann.rungs() == [["b0"], ["a0"], ["c0"]]
        bob.keys(bob.places(lambda text: {"a0": 3, "b0": 3, "c0": 1}[text]), Keys.ENTER)
        bob.shows("by drag")
        ann.keys(Keys.ENTER)
        ann.shows("by drag")

        # By drag, with a reload before the end; what looks like markup is text.
        assert set(ann.responses) == {SCRIPT, IMAGE, "c1"}
        assert SCRIPT in ann.one("#prompt").text
        assert ann.all(".card b, .card img, .card script, #prompt script") == []
        assert "owned" not in ann.driver.title
        ann.drag(ann.chip(SCRIPT), "place 1")
        ann.drag(ann.chip(IMAGE), "place 2")
        ann.driver.refresh()
        ann.shows("by drag")
        assert ann.rungs() == [[SCRIPT], [IMAGE], []]
        ann.drag(ann.all(".card .grip")[ann.responses.index("c1")], "before 1")
        assert ann.rungs() == [["c1"], [SCRIPT], [IMAGE]]
        ann.drag(ann.chip("c1"), "pool")
        assert not ann.one("#submit").is_enabled()
        ann.drag(ann.chip("c1"), "place 2")
        assert [set(rung) for rung in ann.rungs()] == [set(), {"c1", SCRIPT}, {IMAGE}]
        ann.drag(ann.chip("c1"), "before 1")
        assert ann.rungs() == [["c1"], [SCRIPT], [IMAGE]]
        ann.one("#submit").click()
        ann.shows("tied")

        # A tie, a skip, and two steps back to a change of mind.
        ann.keys(ann.places(lambda text: 1 if text == "b2" else 2), Keys.ENTER)
        ann.shows("skipped")
        ann.keys("s")
        ann.shows("last")
        ann.keys("u")
        ann.shows("You skipped this one")
        ann.keys("u")
        ann.shows("You have ranked this one")
        assert [sorted(rung) for rung in ann.rungs()] == [["b2"], ["a2", "c2"], []]
        # The arrows move the response that is selected: c2 out of the tie.
        ann.all(".card")[ann.responses.index("c2")].click()
        ann.keys(Keys.ARROW_DOWN)
        assert ann.rungs() == [["b2"], ["a2"], ["c2"]]
        # With the focus on a chip of which the next row has none.
        ann.one('.chip[data-position="2"]').click()
        ann.keys(Keys.ENTER)
        ann.shows("last")
        assert "3 done · 1 skipped · 1 left" in ann.one("#counts").text

        # The server dies while an answer is on its way; the answer waits in the browser.
        port = str(program.port)
        program.end(signal.SIGKILL)
        ann.keys(ann.places(lambda text: 1 if text == "a4" else 2), Keys.ENTER)
        ann.shows("Your last answer is kept in this browser", busy="true")
        assert len(read_lines(program.journal)) == 6
    with running(sets, out, "--port", port) as program:
        ann.shows("All done")
        assert "you ranked 4 rows and skipped 1 row" in ann.one("#end-text").text
        ann.one("#review").click()
        ann.shows("You skipped this one")
        for number, text in enumerate(ann.responses):
            ann.all(".card")[number].find_elements(By.CSS_SELECTOR, ".places button")[int(text == "a3")].click()
        ann.one("#submit").click()
        ann.shows("you ranked 5 rows")
        status, _, err = program.end()
    assert (status, err) == (0, "")
    found = read_lines(out)
    assert [row["annotators"] for row in found] == [["Ann", "bob"], ["Ann"], ["Ann"], ["Ann"], ["Ann"]]
    assert [row["rankings"][0] for row in found] == [[1, 0, 2], [2, 0, 1], [1, 0, 2], [1, 0], [0, 1]]
    assert found[0]["rankings"][1] == [2, [0, 1]]
    assert found[0]["models"] == ["x", "y", "z"]
    assert [row["responses"] for row in found] == [row["responses"] for row in ROWS]
    assert all(isinstance(parse_record(row, ComparisonSet), ComparisonSet) for row in found)
    assert re.fullmatch(r"(\{.*\}\n){8}", program.journal.read_text())
