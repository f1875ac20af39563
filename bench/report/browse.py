"""The page in a browser without a screen: for its tests, and for the picture of it (`make picture`).

Playwright drives the Chromium that the system has (Debian: `apt-get install chromium`); it downloads none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure import reason

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)
LONGEST = 60_000  # ms until the plots are drawn


def chromium() -> str:
    """The path of the browser.

    Raises:
        RuntimeError: there is none.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise RuntimeError(f"no browser found ({', '.join(NAMES)}): apt-get install chromium")
    return found


@contextmanager
def opened(path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light", scripts: bool = True) -> Iterator[Page]:
    """The page with no network, its plots drawn. `page.problems` are what went wrong in it, requests included."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            width, height = size
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                java_script_enabled=scripts,
                offline=True,
            )
            page = context.new_page()
            page.problems = []
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("console", lambda said: page.problems.append(said.text) if said.type == "error" else None)
            page.on("request", lambda asked: page.problems.append(asked.url) if page.url.startswith("file") else None)
            page.goto(path.resolve().as_uri())
            if scripts:
                page.wait_for_function("document.body.dataset.drawn", timeout=LONGEST)
            yield page
        finally:
            browser.close()


def take_pictures(path: Path, folder: Path) -> list[Path]:
    """The upper part of the page, down to a whole plot or a screen where it has none, at the width of a desktop and of
    a phone.

    Raises:
        RuntimeError: there is no page or no browser, or it does not show the page.
    """
    if not path.is_file():
        raise RuntimeError(f"there is no {path}: run `make report` first")
    try:
        from playwright.sync_api import Error
    except ImportError as error:
        raise RuntimeError(f"{error}: pip install playwright") from None
    taken = []
    for name, size, num_plots in (("desktop", DESKTOP, 4), ("phone", PHONE, 1)):
        picture = folder / f"{path.stem}-{name}.png"
        try:
            with opened(path, size) as page:
                plots = [plot.bounding_box() for plot in page.locator("figure:not(.empty)").all()[:num_plots]]
                height = plots[-1]["y"] + plots[-1]["height"] + 16 if plots else size[1]
                clip = {"x": 0, "y": 0, "width": size[0], "height": height}
                page.screenshot(path=picture, full_page=True, clip=clip)
        except Error as error:
            raise RuntimeError(f"no picture of {path}: {reason(error)}") from error
        taken.append(picture)
    return taken
