import pytest

from dfqc.compiler.errors import UsageError
from dfqc.compiler.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8g", 8 << 30), ("512m", 512 << 20), ("1.5GB", 3 << 29), ("100", 100), ("2 KiB", 2048)],
)
def test_sizes_are_read(text, expected):
    assert parse_size(text, where="--memory") == expected


@pytest.mark.parametrize("text", ["", "g", "8x", "-1g", "0", "1e9", "8g 2m"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="--memory"):
        parse_size(text, where="--memory")


@pytest.mark.parametrize(
    ("text", "expected"), [("20m", 1200), ("90s", 90), ("1h30m", 5400), ("45", 45), ("0.5h", 1800)]
)
def test_durations_are_read(text, expected):
    assert parse_duration(text, where="--budget") == expected


@pytest.mark.parametrize("text", ["", "m", "20x", "-5m", "0", "twenty", "1h 30m"])
def test_other_durations_are_refused(text):
    with pytest.raises(UsageError, match="--budget"):
        parse_duration(text, where="--budget")


def test_values_are_written_for_people():
    assert format_size(512) == "512 B"
    assert format_size(3 << 19) == "1.5 MB"
    assert format_size(5 << 40) == "5.0 TB"
    assert format_duration(0.42) == "0.4 s"
    assert format_duration(42.4) == "42 s"
    assert format_duration(200) == "3 min 20 s"
    assert format_duration(3900) == "1 h 5 min"
