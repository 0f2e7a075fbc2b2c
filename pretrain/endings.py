"""Why a training ended early, in a sentence, on standard error and in ``status.json``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from eosin.configs.errors import EosinError, InterruptedRunError
from eosin.launch.process import World
from eosin.launch.status import end_status
from eosin.pretrain.trainer_config import TrainerConfig

LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
"""What torch says when another rank is gone, as a plain RuntimeError too."""


@contextmanager
def telling_why(config: TrainerConfig, world: World) -> Iterator[None]:
    """Turns what ends a run early into errors for people, and writes the reason down.

    Raises:
        InterruptedRunError: a rank was lost.
        EosinError: memory ran out.
    """
    try:
        yield
    except EosinError as error:
        end_status(config.out, world, error)
        raise
    except RuntimeError as error:
        told = _explained(error, config, world)
        end_status(config.out, world, told or error)
        if told is None:
            raise
        raise told from error


def _explained(error: RuntimeError, config: TrainerConfig, world: World) -> EosinError | None:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        return out_of_memory(config, world)
    if world.size > 1 and (isinstance(error, dist.DistError) or any(word in said for word in LOST)):
        return InterruptedRunError(
            f"rank {world.rank} lost another rank ({said}); the same command goes on from the "
            "newest checkpoint. See the other ranks' last lines for the cause"
        )
    return None


def out_of_memory(config: TrainerConfig, world: World) -> EosinError:
    """What to change, the changes that alter nothing of what is learned first."""
    here = config.batch_size // world.size
    ways = config.ways_to_less_memory(world)
    ways += ["more ranks", f"a batch_size below {config.batch_size}"]
    return EosinError(
        f"out of memory with {here} {config.unit} a rank; give it {', or '.join(ways)} "
        "('eosin plan' tells what each takes)"
    )
