import pytest
import torch

import models
import quantized
from dfqc.compiler.contracts import QuantizerSupplies
from dfqc.compiler.judging import split_judges
from dfqc.compiler.quantize import _choice
from dfqc.compiler.quantize._choice import judging_parts, led_astray
from dfqc.compiler.quantize._targets import make_targets
from dfqc.compiler.simulate import simulated

CPU = torch.device("cpu")
HELD_OUT = models.images(16, seed=9)


def test_what_judges_are_moved_copies_of_what_was_put_aside():
    own = quantized.calib().images[3::4]
    first, images = judging_parts(own, QuantizerSupplies(held_out=HELD_OUT))
    assert torch.equal(first, own)
    assert len(images) == 4 * len(own)
    assert torch.equal(images, judging_parts(own, QuantizerSupplies())[1])
    assert not torch.equal(images[: len(own)], own)
    total = own.double().sum((1, 2, 3)).repeat(4)  # moved pixels are all still there
    torch.testing.assert_close(images.double().sum((1, 2, 3)), total)


def test_of_few_images_the_held_out_ones_that_look_like_data_judge():
    (images,) = judging_parts(torch.empty(0), QuantizerSupplies(held_out=HELD_OUT, fitting=5))
    assert torch.equal(images, HELD_OUT[:5])
    assert judging_parts(torch.empty(0), QuantizerSupplies()) == []


def test_what_images_of_another_kind_put_behind_its_start_was_led_astray():
    graph = quantized.folded("residual")
    fine, coarse = (quantized.quantize(graph, quantized.plan(graph, b)) for b in ("w8a8", "w3a3"))
    judge = {"targets": make_targets(graph, None, CPU), "device": CPU}
    given = QuantizerSupplies(held_out=HELD_OUT, fitting=5)
    learned = {"better": fine, "worse": coarse}
    names, found = led_astray(graph, coarse, learned, given, **judge)
    assert (names, set(found)) == ([], {"start", "better", "worse"})  # no worse is not behind
    with torch.no_grad():
        wanted = graph.module(HELD_OUT[:5]).double().log_softmax(1)
        by = simulated(graph, fine, integer=False).module(HELD_OUT[:5]).double().log_softmax(1)
    expected = float((wanted.exp() * (wanted - by)).sum(1).mean())
    assert found["better"] == pytest.approx(expected, rel=1e-3)
    assert led_astray(graph, fine, learned, given, **judge)[0] == ["worse"]
    nothing = QuantizerSupplies(held_out=HELD_OUT, fitting=0)  # none of them looks like data
    assert led_astray(graph, fine, learned, nothing, **judge) == ([], {})


@pytest.mark.parametrize(("room", "copies"), [(1 << 28, 4), (0, 1)])
def test_large_images_have_fewer_copies_and_what_they_take_is_known(room, copies, monkeypatch):
    monkeypatch.setattr(_choice, "_ROOM", room)
    graph = quantized.folded("residual")
    own, moved = judging_parts(split_judges(quantized.calib(64).images)[1], QuantizerSupplies())
    assert len(moved) == copies * len(own)
    taken = own.nbytes + moved.untyped_storage().nbytes()
    assert taken == _choice.judging_bytes(graph, 64)
