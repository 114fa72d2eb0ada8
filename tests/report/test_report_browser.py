"""The page in a real browser: every picture loads, nothing is logged, both themes and a narrow screen work.

Needs Chromium (Debian: ``apt-get install chromium``). Without one the tests are skipped, or fail where the environment
variable MMREP_REQUIRE_CHROMIUM is 1.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from mmrep.report import write_report

pytestmark = pytest.mark.slow
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# SVG pictures have no naturalWidth: the same address is loaded once more as an <img>.
PROBE = """<script>
window.problems = [];
window.onerror = message => { window.problems.push(String(message)); };
window.addEventListener("load", async () => {
  const seen = {loaded: [], failed: [], boxes: 0};
  const found = [...document.querySelectorAll("img"), ...document.querySelectorAll("image")];
  await Promise.all(found.map(async element => {
    const copy = new Image();
    copy.src = element.getAttribute("src") || element.getAttribute("href");
    try { await copy.decode(); } catch (error) { seen.failed.push(String(error)); return; }
    const own = element instanceof HTMLImageElement ? element.complete && element.naturalWidth : copy.naturalWidth;
    own > 0 ? seen.loaded.push(own) : seen.failed.push("empty");
    const box = element.getBoundingClientRect();
    if (box.width > 0 && box.height > 0) seen.boxes += 1;
  }));
  seen.width = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.ground = getComputedStyle(document.body).backgroundColor;
  seen.charts = [...document.querySelectorAll(".charts svg path")].length;
  seen.stroke = getComputedStyle(document.querySelector(".charts svg [id*=line2d] path[style*=series]")).stroke;
  seen.problems = window.problems;
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        message = "no Chromium here: apt-get install chromium"
        assert os.environ.get("MMREP_REQUIRE_CHROMIUM") != "1", message
        pytest.skip(message)
    return found


@pytest.fixture
def browse(chromium, tmp_path):
    """Open a file with further flags: the dumped page and the console's lines, of which there must be none."""

    def run(path, *flags, quiet=True):
        home = tmp_path / "profile"
        shutil.rmtree(home, ignore_errors=True)
        done = subprocess.run(
            [chromium, *FLAGS, f"--user-data-dir={home}", *flags, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not (quiet and console), console
        return done.stdout, console

    return run


def probed(browse, path, *flags):
    """What the probe sees on a copy of the page without its policy, which forbids scripts."""
    text, policies = POLICY.subn("", path.read_text(encoding="utf-8"))
    assert policies == 1
    copy = path.with_name("probed.html")
    copy.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom, _ = browse(copy, "--virtual-time-budget=20000", "--dump-dom", *flags)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found, "the page's load event never came"
    return json.loads(html.unescape(found[1]))


def test_every_picture_loads_and_no_error_is_logged(report, browse, tmp_path):
    path = write_report(report, tmp_path / "report.html")
    seen = probed(browse, path)
    text = path.read_text(encoding="utf-8")
    expected = len(re.findall(r"<img |<image ", text))
    assert expected > 80
    assert (len(seen["loaded"]), seen["failed"], seen["boxes"]) == (expected, [], expected)
    assert seen["problems"] == []
    assert seen["charts"] > 20
    browse(path, "--dump-dom")  # the page itself, with its policy: it breaks no rule of its own


def test_the_probe_sees_a_broken_picture_and_a_broken_rule(report, browse, tmp_path):
    path = write_report(report, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    uri = re.search(r"data:image/png;base64,[^\"]{400,}", text)
    assert uri
    path.write_text(text.replace(uri[0], uri[0][:120]), encoding="utf-8")
    assert probed(browse, path)["failed"]
    path.write_text(text.replace("</body>", "<script>1</script></body>"), encoding="utf-8")
    _, console = browse(path, "--dump-dom", quiet=False)
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize(("scheme", "flag"), [("light", "1"), ("dark", "0")])
def test_both_themes(scheme, flag, report, browse, tmp_path):
    path = write_report(report, tmp_path / "report.html")
    theme = f"--blink-settings=preferredColorScheme={flag}"
    seen = probed(browse, path, theme)
    ground, stroke = ([int(n) for n in re.findall(r"\d+", seen[key])[:3]] for key in ("ground", "stroke"))
    assert (min(ground) > 200) if scheme == "light" else (max(ground) < 60)
    assert contrast(ground, stroke) >= 3  # WCAG 1.4.11, graphical objects
    shot = tmp_path / "shot.png"
    browse(path, theme, "--window-size=1280,3000", f"--screenshot={shot}")
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape == (3000, 1280, 3)
    assert list(picture[-1, 2]) == ground
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500


def test_a_narrow_screen_does_not_scroll_sideways(report, browse, tmp_path):
    path = write_report(report, tmp_path / "report.html")
    assert probed(browse, path, "--window-size=500,900")["width"] <= 0  # the narrowest window that Chromium makes


def contrast(one, other):
    """The ratio of WCAG 2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(color):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
