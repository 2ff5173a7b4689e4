"""The pages in a real browser, where there is one: nothing is wider than a phone or a screen."""

import re
import shutil
import subprocess

import pytest

from dfqc.compiler._html import page
from dfqc.compiler.bench_sweep import sweep_html
from dfqc.compiler.report import report_html
from test_report import LAYERS, MANIFEST

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

WIDTHS = (360, 1280)
LONG = "stages.3.blocks.12.a_very_long_layer_name_that_never_ends.depthwise.conv_" * 2


def measure(folder, text):
    """Return, per width, how wide the page is, and what stands out of it."""
    (folder / "page.html").write_text(text)
    frames = "".join(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in WIDTHS
    )
    script = """addEventListener('load', () => { document.title = [...document.querySelectorAll(
      'iframe')].map(f => { const d = f.contentDocument.documentElement; const out = [...d
      .querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > d.clientWidth + 1
      && !e.closest('.scroll, pre')).map(e => e.tagName); return [d.scrollWidth, ...out].join(' ')
      }).join('|') })"""
    (folder / "frame.html").write_text(f"<!doctype html>{frames}<script>{script}</script>")
    done = subprocess.run(
        [
            *(
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--dump-dom",
                "--hide-scrollbars",
            ),
            *("--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"),
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    return title.split("|")


def pages():
    layers = [row | {"name": f"{LONG}{index}"} for index in range(60) for row in LAYERS]
    command = "dfqc build " + " ".join(f"--layer 'layer{i}.*=w8a8'" for i in range(40))
    notes = ["A note with " + "averylongword" * 20]
    manifest = MANIFEST | {"layers": layers, "command": command, "notes": notes, "status": "failed"}
    yield report_html(manifest)
    latency = {"median_ms": 1.0, "p90_ms": 2.0, "p99_ms": 30.0, "mean_ms": 1.2, "best_ms": 0.9}
    engine = {"name": LONG, "target": "ort", "latency_ms": latency, "images_per_second": 1e6}
    engine |= {"speedup": {"median": 1.0, "best": 1.0}, "model_bytes": 1, "engine_bytes": 1}
    engine |= {"load_ms": 1.0, "top1": None, "joules_per_image": None}
    settings = [{"batch": b, "threads": 1, "engines": [engine]} for b in (1, 8)]
    about = {"cpu": LONG, "input": [3, 224, 224], "energy": LONG}
    yield sweep_html(settings[0] | {"settings": settings} | about)


@pytest.mark.parametrize("text", list(pages()), ids=["report", "bench"])
def test_a_page_is_as_wide_as_its_window(text, tmp_path):
    assert measure(tmp_path, text) == [str(width) for width in WIDTHS]


def test_what_stands_out_is_found(tmp_path):
    wide = page("t", ['<div style="width:900px">x</div>'])
    narrow, screen = measure(tmp_path, wide)
    assert narrow.endswith(" DIV")
    assert screen == str(WIDTHS[1])
