"""The moving average of weights against a loop, and the ways in which others get it wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mmrep.schedules import Clock, Schedule
from mmrep.teacher import Teacher, TeacherConfig


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def walk(module, seed):
    """A step of the student: other weights, other statistics."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
        module.train()(torch.randn(8, 3, dtype=next(module.parameters()).dtype))


def constant(momentum, **more):
    return TeacherConfig(momentum=momentum, schedule=None, **more)


@pytest.mark.parametrize("buffers", ["copy", "ema"])
def test_the_average_equals_a_loop(buffers):
    student = net()
    teacher = Teacher(constant(0.9, buffers=buffers), [student])
    twin = copy.deepcopy(student)
    for seed in range(4):
        walk(student, seed)
        teacher.update(Clock())
        with torch.no_grad():
            for old, new in zip(twin.parameters(), student.parameters(), strict=True):
                old.copy_(0.9 * old + 0.1 * new)
            for name in ("running_mean", "running_var"):
                old, new = getattr(twin[1], name), getattr(student[1], name)
                old.copy_(0.9 * old + 0.1 * new if buffers == "ema" else new)
    twin[1].num_batches_tracked.fill_(4)
    for a, b in zip(teacher.copies[0].state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert student[1].running_mean.abs().max() > 0  # F12: statistics that stay at 0, counters that are averaged away
    assert teacher.copies[0][1].running_mean.abs().max() > 0


def test_the_teacher_of_a_bf16_student_moves():
    student = net().bfloat16()
    teacher = Teacher(constant(0.9996), [student])
    start = teacher.copies[0][0].weight.clone()
    assert start.dtype == torch.float32
    with torch.no_grad():
        student[0].weight.add_(1.0)
    for _ in range(1000):
        teacher.update(Clock())
    closed = ((teacher.copies[0][0].weight - start) / (student[0].weight.float() - start)).mean()
    assert math.isclose(float(closed), 1 - 0.9996**1000, rel_tol=1e-3)


def test_of_finds_the_copy_of_a_module_and_of_its_parts():
    student, other = net(), nn.Linear(2, 2)
    teacher = Teacher(constant(0.5), [student[0], student, other, student])
    assert len(teacher.copies) == 2
    assert teacher.of(student) is teacher.copies[0]
    assert teacher.of(student[3]) is teacher.copies[0][3]
    assert teacher.of(other) is teacher.copies[1]
    assert teacher.of(student[3]) is not student[3]
    with pytest.raises(KeyError, match="BatchNorm1d has no teacher"):
        teacher.of(nn.BatchNorm1d(4))


def test_it_is_always_in_eval_mode_and_has_no_gradient():
    student = net()
    teacher = Teacher(constant(0.5), [student])
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    before = copy.deepcopy(teacher.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(teacher.of(student)(x), teacher.of(student)(x), atol=0, rtol=0)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    assert not teacher.of(student)(x).requires_grad


def test_the_momentum_follows_its_schedule():
    teacher = Teacher(TeacherConfig(momentum=0.9), [net()])
    assert teacher.update(Clock(step=0, total=10)) == pytest.approx(0.9)
    assert teacher.update(Clock(step=5, total=10)) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert teacher.update(Clock(step=10, total=10)) == pytest.approx(1.0)
    assert teacher.update(Clock(step=7)) == pytest.approx(0.9)
    linear = Teacher(TeacherConfig(momentum=0.9, schedule=Schedule(shape="linear", end=0.5)), [net()])
    assert linear.update(Clock(step=5, total=10)) == pytest.approx(0.7)


def test_momentum_1_rests_and_0_copies():
    student = net()
    for momentum in (0.0, 1.0):
        teacher = Teacher(constant(momentum), [student])
        old = teacher.copies[0][0].weight.clone()
        walk(student, 3)
        teacher.update(Clock())
        torch.testing.assert_close(teacher.copies[0][0].weight, old if momentum else student[0].weight, atol=0, rtol=0)


def test_a_saved_teacher_comes_back():
    student = net()
    teacher = Teacher(constant(0.5), [student])
    walk(student, 1)
    teacher.update(Clock())
    other = Teacher(constant(0.5), [net(5)])
    other.load_state_dict(teacher.state_dict())
    for a, b in zip(teacher.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert len(teacher.state_dict()) == len(student.state_dict())  # the student is not saved with it
