"""A real browser without a window."""

import os
import shutil

import pytest
from selenium import webdriver


def chromium() -> webdriver.Chrome:
    """Start Chromium; where it is not installed the test is skipped, or fails with CI=true."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        why = "chromium and chromedriver are not here (Debian: chromium, chromium-driver)"
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Root, which tests often are in a container, has no sandbox there.
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))
