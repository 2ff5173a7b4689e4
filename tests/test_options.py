from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from dfqc.compiler.errors import UsageError
from dfqc.compiler.options import plugin_options


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(10, ge=1)
    loss: Literal["std", "kl"] = "std"


PLUGIN = SimpleNamespace(Options=Options, PRESETS={"quick": {"steps": 2}})


def test_defaults_then_the_effort_then_the_user():
    assert plugin_options(PLUGIN, "p", "standard", {}).steps == 10
    assert plugin_options(PLUGIN, "p", "quick", {}).steps == 2
    assert plugin_options(PLUGIN, "p", "quick", {"steps": 5}).steps == 5
    assert plugin_options(SimpleNamespace(Options=Options), "p", "max", {}).steps == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 3}, "p has no option 'step'; it has: loss, steps"),
        ({"steps": 0}, "p: option steps: got 0; .*greater than or equal to 1"),
        ({"loss": "mse"}, "p: option loss: got 'mse'.*'std' or 'kl'"),
    ],
)
def test_wrong_options_are_the_users_fault(given, message):
    with pytest.raises(UsageError, match=message):
        plugin_options(PLUGIN, "p", "standard", given)
