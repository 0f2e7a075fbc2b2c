"""Moving averages in fp32: the teacher's weights, and the centre of its logits.

One fused kernel reads an average and what it follows and writes the average, with no temporary
tensor: it is the kernel of gradient descent, given the followed tensor for a gradient,

    a ← a - r · (x + w · a)  with  r = -(1 - m), w = -1:   a ← m · a + (1 - m) · x,

because that kernel leaves everything alone where a tensor on the device says so. A bad step so
costs no wait, and NaNs of `x` do not reach the average even with a weight of zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eosin.pretrain.local_part import local


@torch.no_grad()
def follow(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    momentum: float,
    bad: Tensor | None = None,
) -> None:
    """Averages ← momentum · averages + (1 - momentum) · values, in place, in fp32.

    Args:
        averages: fp32; one in 16 bits would lose updates smaller than its rounding, which is all
            of them at a momentum near one.
        values: of the same shapes, strides, dtype and device.
        momentum: in [0, 1].
        bad: 1 to leave every average as it is, 0 to move it, fp32 [] on the same device.

    Raises:
        ValueError: a tensor is not fp32, shapes or strides differ, the lists are not equally long,
            or the momentum lies outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1]")
    for average, value in zip(averages, values, strict=True):
        for dtype in (average.dtype, value.dtype):
            if dtype != torch.float32:
                raise ValueError(f"a moving average needs float32 tensors, not {dtype}")
        # the kernel walks through both memories alike, and does not look at the strides itself
        if (average.shape, average.stride()) != (value.shape, value.stride()):
            raise ValueError(
                f"an average of shape {tuple(average.shape)} and strides {average.stride()} cannot "
                f"follow values of {tuple(value.shape)} and {value.stride()}"
            )
    if not averages:
        return
    torch._fused_sgd_(
        list(averages),
        list(values),  # read only: they would be written to with a gradient scale alone
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=momentum - 1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=bad,
    )


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, momentum: float, bad: Tensor | None = None
) -> None:
    """The teacher's parameters follow the student's of the same name; its buffers are copied.

    The student may have more (a predictor has no teacher).

    Args:
        teacher: the average; fp32.
        student: the network that has just been stepped; fp32.
        momentum: of the parameters.
        bad: 1 to leave the teacher as it is, fp32 [] on its device; see `follow`.

    Raises:
        ValueError: the student lacks a tensor of the teacher's, or one that `follow` refuses.
    """
    followed, current = dict(student.named_parameters()), dict(student.named_buffers())
    own, buffers = dict(teacher.named_parameters()), dict(teacher.named_buffers())
    missing = sorted((own.keys() - followed.keys()) | (buffers.keys() - current.keys()))
    if missing:
        raise ValueError(f"the student has no {missing[0]} for the teacher's to follow")
    follow([local(a) for a in own.values()], [local(followed[name]) for name in own], momentum, bad)
    for name, buffer in buffers.items():
        value = current[name]
        buffer.copy_(value if bad is None else torch.where(bad != 0, buffer, value))
