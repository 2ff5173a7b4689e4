from pathlib import Path

import pytest

from dfqc.compiler._identity import model_digest
from dfqc.compiler.choice_text import describe_choice
from dfqc.compiler.errors import LoadError


def test_what_was_kept_is_said_beside_what_was_not():
    found = {"nearest": 0.4, "closed": 0.1, "reconstructed": 0.25}
    text = describe_choice({"kept": "closed", "heldout_distance": found})
    assert text is not None
    kept, beside = text.split("; beside it ")
    assert kept == "the closed form (gptq), divergence 0.1 from float on held-out images"
    assert beside == "learned block by block 0.25, rounding to nearest 0.4"


def test_why_the_nearest_is_not_kept_is_said():
    about = {
        "kept": "closed",
        "heldout_distance": {"closed": 0.163, "reconstructed": 0.161},
        "led_astray": ["reconstructed"],
        "matched_distance": {"start": 0.106, "reconstructed": 0.187},
    }
    text = describe_choice(about)
    assert text is not None
    assert text.endswith(
        "; learned block by block is out for 0.187 on images that match the batch norms in another "
        "way, where the closed form has 0.106"
    )


@pytest.mark.parametrize("about", [{}, {"kept": "closed"}, {"kept": "x", "heldout_distance": {}}])
def test_nothing_is_said_where_there_was_no_choice(about):
    assert describe_choice(about) is None


def test_a_missing_factory_file_is_asked_for_as_such(tmp_path: Path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"")
    with pytest.raises(LoadError, match=r"there is no file .*net\.py; expected a Python file"):
        model_digest(str(weights), f"{tmp_path}/net.py:build", False, 0)
