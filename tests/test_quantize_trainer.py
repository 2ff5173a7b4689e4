"""What the training of a whole network consists of: losses, teacher, moved images, batches."""

import functools

import pytest
import torch
from torch.nn import functional as F

import classifiers
import models
import pruning
import quantized
from dfqc.compiler.channels import remove
from dfqc.compiler.contracts import Pruned
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize import _trainer, qat
from dfqc.compiler.quantize._kd import Losses, Teacher, feature_loss
from dfqc.compiler.quantize._student import Student, StudentOptions
from dfqc.compiler.quantize._targets import make_targets
from dfqc.compiler.quantize.qat import Options

CPU = torch.device("cpu")
folded = functools.cache(lambda net: fold(classifiers.trained(net)))
HELD_OUT = models.images(32, seed=9)


def test_the_loss_is_kl_at_a_temperature_and_normalized_errors():
    rng = torch.Generator().manual_seed(0)
    wanted, found = (torch.randn(6, 10, generator=rng) * 3 for _ in "ab")
    blocks = [torch.randn(6, 4, 5, 5, generator=rng) * k for k in (1, 100, 1, 100)]
    kl = F.kl_div((found / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean")
    terms = [((b - a) ** 2).mean() / a.var() for a, b in ((blocks[0], blocks[2]), blocks[1::2])]
    assert terms[0] == pytest.approx(float(terms[1]), rel=0.5)  # blocks count alike
    value = Losses(3.0, 0.5, 7.0).of((wanted, blocks[:2]), (found, blocks[2:]))
    assert float(value) == pytest.approx(float(0.5 * 9 * kl + 7 * sum(terms) / 2), rel=1e-5)
    assert float(feature_loss(blocks[:2], blocks[:2])) == 0


def test_a_teacher_of_a_pruned_network_is_what_it_was():
    graph = classifiers.trained("residual")
    keep = pruning.draw(graph, 0.3)
    pruned = fold(remove(graph, keep))
    targets = make_targets(pruned, Pruned(graph, keep), CPU)
    teacher = Teacher(pruned, targets)
    logits, found = teacher(HELD_OUT)
    torch.testing.assert_close(logits, graph.module(HELD_OUT), rtol=1e-4, atol=1e-4)
    result = next(n for n in pruned.module.graph.nodes if n.op == "output").args[0]
    assert result.name not in teacher.exits  # the KL speaks of the output
    assert targets.picks.keys() & set(teacher.exits)
    state = quantized.quantize(pruned, quantized.plan(pruned, "w4a4"))
    student = Student(pruned, state, StudentOptions(), device=CPU, exits=teacher.exits)
    with torch.no_grad():
        assert [v.shape for v in student.features(HELD_OUT)[1]] == [v.shape for v in found]


def test_moved_images_are_mirrored_and_rolled():
    images = models.images(12, seed=2)
    found = _trainer.moved(images, 0.125, torch.Generator().manual_seed(0))
    plain = 0
    for image, other in zip(images, found, strict=True):
        ways = {
            (flip, down, right)
            for flip in (False, True)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal((image.flip(2) if flip else image).roll((down, right), (1, 2)), other)
        }
        assert len(ways) == 1
        plain += ways == {(False, 0, 0)}
    assert plain < 6
    assert torch.equal(found, _trainer.moved(images, 0.125, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("size", [5, 4])
def test_every_image_comes_once_before_any_comes_again(size):
    trainer = object.__new__(_trainer.Trainer)
    trainer.images = torch.arange(10.0).view(10, 1, 1, 1)
    trainer.schedule = qat._schedule(Options(batch_size=size), CPU)
    batches = trainer._batches(torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches) for _ in range(20 // size)]).flatten().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
