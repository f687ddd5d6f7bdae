"""The pages as a person sees them: in headless Chromium nothing overflows, nothing is too small to read, nothing is fetched."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.folders.inspecting import inspect_folder
from sparse_accel.reports.inspection_page import inspection_page
from sparse_accel.reports.run_page import run_page
from tests.export.trained import trained_folder
from tests.unit.test_reports import EXPORTED, story

pytestmark = [pytest.mark.exhaustive]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = {"phone": 360, "tablet": 768, "desktop": 1280}
# Asked of a page in a frame of its own width, by the page around it, since the page itself lets no script run.
PROBE = """
const frame = document.querySelector('iframe'), found = {};
frame.onload = () => {
  const page = frame.contentDocument, all = [...page.querySelectorAll('*')];
  const shown = all.filter(e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden');
  const texts = shown.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const scrolls = e => { for (; e; e = e.parentElement)
      if (/auto|scroll/.test(frame.contentWindow.getComputedStyle(e).overflowX)) return true;
    return false; };
  found.width = page.documentElement.scrollWidth;
  found.smallest = Math.min(...texts.map(e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize)));
  found.outside = texts.filter(e => { const box = e.getBoundingClientRect();
    return !scrolls(e) && (box.left < -1 || box.right > frame.clientWidth + 1); }).map(e => e.outerHTML.slice(0, 90));
  found.charts = [...page.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height]);
  found.cells = page.querySelectorAll('table.heat td').length;
  found.fetched = frame.contentWindow.performance.getEntriesByType('resource').length;
  const luminance = c => { const p = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * p[0] + .7152 * p[1] + .0722 * p[2]; };
  const style = e => frame.contentWindow.getComputedStyle(e), ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  found.contrast = Math.min(...[...page.querySelectorAll('p, td:not([style]), th, h2, summary')].map(e =>
    ratio(luminance(style(e).color), luminance(style(e.closest('section') || page.body).backgroundColor))));
  found.dark = luminance(style(page.body).backgroundColor) < .1;
  document.body.dataset.found = JSON.stringify(found);
};
frame.srcdoc = SOURCE;
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = trained_folder(tmp_path_factory.mktemp("model"), sparsity=0.8, layers=2)
    return {
        "run": run_page(story(exported=EXPORTED, deployment="run/deployment")),
        "model": inspection_page(inspect_folder(model)),
    }


def look(browser: str, source: str, width: int, dark: bool, folder: Path) -> dict[str, Any]:
    """What the probe finds in a page of that width."""
    text = json.dumps(source).replace("</", "<\\/")
    around = f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:4000px"></iframe>'
    (folder / "around.html").write_text(f"{around}<script>{PROBE.replace('SOURCE', text)}</script>", "utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000", "--dump-dom",
        (folder / "around.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    match = re.search(r'data-found="([^"]*)"', shown)
    assert match, f"the browser did not show the page: {shown[:500]}"
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("name", ["run", "model"])
def test_a_page_can_be_read(
    browser: str, pages: dict[str, str], name: str, device: str, dark: bool, tmp_path: Path
) -> None:
    width = WIDTHS[device]
    found = look(browser, pages[name], width, dark, tmp_path)
    assert found["width"] <= width, "the page scrolls sideways"
    assert found["outside"] == []
    assert found["smallest"] >= 11.5
    assert found["contrast"] >= 4.5, "text is too faint"
    assert found["dark"] is dark
    assert found["fetched"] == 0
    assert found["cells"] >= 3 and len(found["charts"]) >= (4 if name == "run" else 1)
    assert all(across > 150 and up > 150 for across, up in found["charts"])
