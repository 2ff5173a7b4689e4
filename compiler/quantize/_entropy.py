"""Entropy of softmax distributions: logits (n, classes) in, nats out; a loss of students."""

from __future__ import annotations

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) of every row, (n,): 0..log(classes)."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def student_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return -T² mean H((z_T - z_Q) / T): the student's side of AdaDFQ's game.

    The entropy is largest where z_T - z_Q is one constant, which softmax does not see: the loss is
    then -T² log(classes). Around that it is the variance of z_T - z_Q over the classes, halved.
    """
    return -(temperature**2) * entropy((teacher - student) / temperature).mean()
