"""Moving averages against plain arithmetic in fp64, and what a bad step leaves alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from eosin.pretrain.ema import follow, update_teacher


class Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(13, 7, generator=generator))
        self.gain = nn.Parameter(torch.randn(5, generator=generator))
        self.register_buffer("periods", torch.randn(3, generator=generator))
        self.register_buffer("count", torch.tensor(seed))


@pytest.mark.pitfall(16)
def test_many_updates_are_the_weighted_sum_of_all_students() -> None:
    teacher = Network(0).requires_grad_(False)
    momenta = [0.9, 0.5, 0.996, 1.0, 0.0, 0.7]
    expected = teacher.weight.double()
    for seed, momentum in enumerate(momenta, start=1):
        student = Network(seed)
        before = copy.deepcopy(student.state_dict())
        update_teacher(teacher, student, momentum)
        expected = momentum * expected + (1 - momentum) * student.weight.detach().double()
        torch.testing.assert_close(teacher.weight, expected.float(), rtol=1e-6, atol=1e-6)
        assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert torch.equal(teacher.get_buffer("periods"), student.get_buffer("periods"))
    assert int(teacher.get_buffer("count")) == len(momenta)


@pytest.mark.pitfall(16)
def test_small_updates_are_not_lost_in_fp32_and_16_bits_are_refused() -> None:
    average, target = [torch.ones(3)], [torch.full((3,), 1.1)]
    for _ in range(200):
        follow(average, target, 0.9995)
    torch.testing.assert_close(
        average[0], torch.full((3,), 1.1 - 0.1 * 0.9995**200), rtol=1e-4, atol=0
    )
    in_bf16 = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(200):
        in_bf16.lerp_(torch.full_like(in_bf16, 1.1), 0.0005)
    assert torch.equal(in_bf16, torch.ones_like(in_bf16))  # what is refused: it never moves
    with pytest.raises(ValueError, match=r"needs float32 tensors, not torch\.bfloat16"):
        follow([in_bf16], target, 0.9)


@pytest.mark.pitfall(21)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_leaves_teacher_and_centre_alone_whatever_the_student_holds(
    value: float,
) -> None:
    teacher, student = Network(0).requires_grad_(False), Network(1)
    teacher.gain[0] = -0.0
    with torch.no_grad():
        student.weight[0, 0] = value
        student.get_buffer("periods")[0] = value
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    bad = torch.tensor(1.0)
    update_teacher(teacher, student, 0.9, bad)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(torch.signbit(tensor), torch.signbit(before[name]))
    centre = torch.randn(9, generator=torch.Generator().manual_seed(2))
    kept = centre.clone()
    follow([centre], [torch.full((9,), value)], 0.9, bad)
    assert torch.equal(centre, kept)


def test_a_good_step_under_the_guard_is_the_same_to_the_bit() -> None:
    teachers = [Network(0).requires_grad_(False) for _ in range(2)]
    update_teacher(teachers[0], Network(1), 0.95)
    update_teacher(teachers[1], Network(1), 0.95, torch.tensor(0.0))
    first, second = (t.state_dict() for t in teachers)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parameters_are_matched_by_name_and_none_may_be_missing() -> None:
    student = nn.ModuleDict({"predictor": nn.Linear(2, 2), "backbone": Network(1)})
    teacher = nn.ModuleDict({"backbone": Network(0)}).requires_grad_(False)
    update_teacher(teacher, student, 0.0)
    expected: Tensor = student["backbone"].get_parameter("weight")
    torch.testing.assert_close(teacher["backbone"].get_parameter("weight"), expected.detach())
    with pytest.raises(ValueError, match=r"the student has no predictor\.bias"):
        update_teacher(student.requires_grad_(False), teacher, 0.9)
    for values in (torch.ones(3, 2).T, torch.ones(1).expand(2, 3), torch.ones(6)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and strides \(3, 1\) cannot follow"):
            follow([torch.ones(2, 3)], [values], 0.9)
    with pytest.raises(ValueError, match=r"momentum=1\.5 must lie in \[0, 1\]"):
        follow([torch.ones(1)], [torch.ones(1)], 1.5)
