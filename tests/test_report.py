import csv
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from dfqc.compiler.report import contact_sheet, layers_csv, open_points, report_html
from pages import Page

LAYERS = [
    {
        "name": "layer1.0.conv1",
        "op": "Conv2d",
        "asked": "w4a4",
        "exported": "w4a4",
        "executed": "QLinearConv",
        "rounding": "learned",
        "reason": "8-bit kernel, 4-bit grid",
        "sqnr_db": 20.0,
    },
    {
        "name": "fc",
        "op": "Linear",
        "asked": "w4a4",
        "exported": "w8a8",
        "executed": "QGemm",
        "rounding": "closed",
        "reason": 'last layer: "ends", <8 bits',
        "sqnr_db": None,
    },
]
MANIFEST = {
    "schema": 1,
    "dfqc": "0.1.0",
    "target": "ort",
    "bits": "w4a4",
    "seed": 7,
    "command": "dfqc build net.pt2 --bits w4a4",
    "model": {"source": "net.pt2", "sha256": "c0ffee" * 10, "params": 272474},
    "metrics": {
        "top1": {"float": 91.6, "simulated": 90.82, "engine": 90.84, "images": 5000},
        "agreement": {"simulated": 96.11, "engine": 96.13},
        "sqnr_db": 18.77,
        "latency_ms": {"float": 1.52, "engine": 0.61, "speedup": 2.49, "batch": 1, "threads": 2},
    },
    "size": {"float_bytes": 1_100_000, "model_bytes": 200_000, "ideal_bytes": 160_000},
    "parity": {"max_abs": 0.01234, "argmax_agreement": 99.95, "worst_layer": "layer2.1.conv2"},
    "calib": {
        "method": "zeroq",
        "images": 256,
        "score": 0.87,
        "quality": {"channels_silent": 31, "evenness": 0.62},
        "warnings": ["the images are 0.87 away: take another <synth>"],
    },
    "gates": [
        {"name": "max-drop", "value": 0.76, "limit": 1.0, "passed": True},
        {"name": "min-speedup", "value": 2.49, "limit": 3.0, "passed": False},
    ],
    "stages": [
        {
            "name": "synthesize",
            "key": "ab" * 32,
            "seconds": 83.0,
            "cached": False,
            "peak_rss_bytes": 900 << 20,
        },
        {"name": "trace", "key": "cd" * 32, "seconds": 1.5, "cached": True, "peak_rss_bytes": 0},
    ],
    "layers": LAYERS,
    "environment": {"cpu": "Some CPU", "torch": "2.13.0"},
    "notes": ["No TensorRT engine was built."],
}


def read(manifest, sheet=None):
    return "\n".join(Page(report_html(manifest, sheet)).text)


def test_the_page_is_self_contained():
    reader = Page(report_html(MANIFEST, b"\x89PNG"))
    assert len(reader.references) == 1
    assert reader.references[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?:|url\(|@import", report_html(MANIFEST))


@pytest.mark.parametrize(
    "text",
    [
        *("net.pt2 · w4a4 · ort", "0.1.0", "272,474", "zeroq", "dfqc build net.pt2 --bits w4a4"),
        *("91.60", "90.82", "90.84", "96.11", "96.13", "18.77", "5000", "-0.76"),
        *("1.520", "0.610", "2.49", "batch 1", "2 threads", "5.50×", "1.25×"),
        *("99.95", "0.0123", "layer2.1.conv2", "1 of 2", "min-speedup", "1 min 23 s", "900.0 MB"),
        *("layer1.0.conv1", "QLinearConv", "8-bit kernel, 4-bit grid", "20.0", "Some CPU"),
        *("0.87", "channels silent", "31", "0.62", "real images have 0.1 to 0.2"),
        *("Warning: the images are 0.87 away: take another <synth>",),
        *("No TensorRT engine was built.", "c0ffee" * 10, "seed 7"),
    ],
)
def test_every_figure_is_on_the_page(text):
    page = read(MANIFEST)
    assert text.lower() in page.lower()


def test_text_from_the_model_is_escaped():
    layers = [LAYERS[0] | {"name": "<script>alert(1)</script>", "reason": "a & b"}]
    page = report_html(MANIFEST | {"layers": layers, "model": {"source": "<img src=x>"}})
    assert "<script>" not in page
    assert "<img" not in page
    assert "a &amp; b" in page


def test_shares_have_their_intervals():
    page = read(MANIFEST)
    assert "90.84 (90.01 to 91.61)" in page  # Wilson, of 5,000
    assert "96.13 (" not in page  # of how many images is not known
    top1 = MANIFEST["metrics"]["top1"] | {"drop_standard_error": 0.3}
    page = read(MANIFEST | {"metrics": MANIFEST["metrics"] | {"top1": top1}})
    assert "0.76 ± 0.59 points" in page


def test_charts_are_drawn_of_what_was_measured():
    tags = Page(report_html(MANIFEST)).tags
    assert tags.count("svg") == 5  # shares, latency, sizes, layers, stages
    bare = {"schema": 1, "dfqc": "0.1.0", "target": "ort", "layers": [{"name": "a"}]}
    assert Page(report_html(bare)).tags.count("svg") == 0


def test_layers_are_colored_by_the_bits_of_their_weights():
    layers = [LAYERS[0] | {"exported": bits, "name": bits} for bits in ("w4a4", "w8a8", "w4a8")]
    page = report_html(MANIFEST | {"layers": layers})
    colors = re.findall(r'<rect[^>]*fill="var\(--c(\d)\)"><title>w', page)
    assert colors == ["1", "0", "1"]
    assert re.findall(r"</i>(\d-bit weights)</span>", page) == ["4-bit weights", "8-bit weights"]


def test_what_is_said_of_many_layers_is_said_once():
    layers = [LAYERS[0] | {"name": f"l{i}", "rounding": None} for i in range(9)] + [LAYERS[1]]
    page = read(MANIFEST | {"layers": layers})
    assert page.count("8-bit kernel, 4-bit grid") == 1
    assert page.count("note 1") == 9
    assert "Note 1: 8-bit kernel, 4-bit grid" in page
    assert LAYERS[1]["reason"] in page
    assert "closed" in page
    bare = read(MANIFEST | {"layers": [row | {"rounding": None} for row in layers]})
    assert "rounding" not in bare


def test_the_verdict_is_on_top():
    page = report_html(MANIFEST | {"status": "failed"})
    assert '<p class="verdict failed">failed: min-speedup</p>' in page


def test_passed_and_failed_gates_are_marked():
    page = report_html(MANIFEST)
    assert page.count('<span class="passed">passed</span>') == 1
    assert page.count('<span class="failed">failed</span>') == 1


def test_bars_grow_with_the_sqnr_and_stay_in_their_cell():
    values = [-3.0, 0.0, 20.0, 40.0, 99.0, math.inf, None]
    page = report_html(MANIFEST | {"layers": [LAYERS[0] | {"sqnr_db": v} for v in values]})
    widths = [int(w) for w in re.findall(r'class="bar" style="width:(\d+)%"', page)]
    assert widths == [0, 0, 50, 100, 100, 100, 0]


def test_a_bare_manifest_gives_a_page_that_says_what_is_missing():
    bare = {"schema": 1, "dfqc": "0.1.0", "target": "ort", "layers": [{"name": "a"}, {"name": "b"}]}
    points = open_points(bare)
    assert [point.split(":")[0] for point in points] == ["Accuracy", "Latency", "Parity", "Kernels"]
    assert "what executes 2 of the layers" in points[3]
    page = read(bare)
    assert all(point in page for point in points)
    assert "None were set." in page
    assert "None" not in page.replace("None were set.", "")


def test_a_full_manifest_leaves_only_its_own_notes_open():
    assert open_points(MANIFEST) == ["No TensorRT engine was built."]
    assumed = MANIFEST | {"image": {"assumed": True}, "notes": []}
    assert [point.split(":")[0] for point in open_points(assumed)] == ["Preprocessing"]


def effects(*decibels):
    rows = zip((2, 4, 8), decibels, strict=True)
    return {str(b): {"sqnr_db": v, "kl": 0.1, "agreement": 99.0} for b, v in rows}


ALLOCATED = MANIFEST | {
    "allocation": {
        "limit": "--avg-bits 3.5",
        "chosen": {"layer1.0.conv1": 4},
        "all_widest": False,
        "predicted_sqnr_db": 21.73,
        "avg_bits": 3.4921,
        "file_bytes": None,
        "images": 64,
    },
    "layers": [
        LAYERS[0] | {"sensitivity": effects(11.14, 26.66, 51.0)},
        LAYERS[1] | {"sensitivity": effects(9.0, 19.0, None)},
    ],
}


@pytest.mark.parametrize("text", ["--avg-bits 3.5", "3.49", "21.73 dB", "64 calibration images",
                                  "11.1", "26.7", "w4 alone (dB)", "given"])  # fmt: skip
def test_the_choice_of_bits_is_on_the_page(text):
    assert text in read(ALLOCATED)


def test_a_limit_that_is_none_is_said():
    text = "The limit is more than all of them need."
    assert text not in read(ALLOCATED)
    allocation = ALLOCATED["allocation"] | {"all_widest": True}
    assert text in read(ALLOCATED | {"allocation": allocation})
    assert "Weight bits under a limit" not in read(MANIFEST | {"allocation": None})


def test_layers_csv_has_what_each_layer_does_alone():
    rows = list(csv.DictReader(io.StringIO(layers_csv(ALLOCATED))))
    assert [row["w4_alone_db"] for row in rows] == ["26.66", "19.0"]
    assert rows[1]["w8_alone_db"] == ""
    assert "w4_alone_db" not in layers_csv(MANIFEST)


def test_layers_csv_is_read_back():
    rows = list(csv.DictReader(io.StringIO(layers_csv(MANIFEST))))
    assert [row["name"] for row in rows] == ["layer1.0.conv1", "fc"]
    assert rows[0] == {k: str(v) for k, v in LAYERS[0].items()} | {"ms": ""}
    assert rows[1]["reason"] == LAYERS[1]["reason"]
    assert rows[1]["sqnr_db"] == ""


def test_the_time_of_each_layer_is_told_where_the_engine_was_profiled():
    build = {"layer_ms": {"fc": 0.01234}, "latency_ms": {"8": {}, "32": {}}}
    timed = MANIFEST | {"build": build}
    rows = list(csv.DictReader(io.StringIO(layers_csv(timed))))
    assert [row["ms"] for row in rows] == ["", "0.01234"]
    page = read(timed)
    assert "ms: profiled at batch 8" in page
    assert "0.0123" in page
    assert report_html(timed).count(">ms</th>") == 1
    assert "profiled at batch" not in read(MANIFEST)
    assert ">ms</th>" not in report_html(MANIFEST)


def test_layers_csv_ignores_fields_of_later_versions():
    text = layers_csv({"layers": [LAYERS[0] | {"later": 1}]})
    assert text.splitlines()[0] == "name,op,asked,exported,executed,rounding,reason,sqnr_db,ms"


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_shows_every_image_in_its_place(channels):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 6, channels), dtype=np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(images, columns=4))))
    enlarge = 16  # 96 // 6
    assert sheet.shape == ((3 * 9 - 1) * enlarge, (4 * 7 - 1) * enlarge, 3)
    small = sheet[::enlarge, ::enlarge]
    for index, image in enumerate(images):
        top, left = index // 4 * 9, index % 4 * 7
        tile = small[top : top + 8, left : left + 6]
        np.testing.assert_array_equal(tile, np.broadcast_to(image, tile.shape))
    assert (small[8] == 255).all()
    assert (small[18:, 14:] == 255).all()


def test_contact_sheet_of_large_images_is_not_enlarged():
    images = np.zeros((2, 224, 224, 3), np.uint8)
    assert Image.open(io.BytesIO(contact_sheet(images))).size == (449, 224)
