"""Where a run goes on: its newest checkpoint that belongs to it; or an earlier one after a spike.

``skips.json`` of the run says which data is passed over since spikes were met. It is written before
anything else is undone: a checkpoint of a later step that knows nothing of a skip belongs to what
was left behind, whenever the process was killed.
"""

import json
from dataclasses import replace
from pathlib import Path

from eosin.configs.errors import ConfigError, EosinError
from eosin.configs.load import as_plain
from eosin.launch.artefacts import read_json, write_json
from eosin.launch.process import World
from eosin.launch.run_dir import changed_keys, changes_since
from eosin.pretrain.checkpoint import TrainState, list_checkpoints
from eosin.pretrain.run_checkpoints import Checkpoints
from eosin.pretrain.spike import LossSpikeError
from eosin.pretrain.trained import Trained
from eosin.pretrain.trainer_config import MAY_CHANGE, TrainerConfig

Skips = tuple[tuple[int, int], ...]


def refuse_changes(config: TrainerConfig, world: World) -> None:
    """Compares the config with that of the run folder, where a run is there to go on with.

    Raises:
        ConfigError: it differs in what is learned, and `accept_changes` does not say that it may.
    """
    if list_checkpoints(config.out / "checkpoints"):
        _judge(config, world, changes_since(config.out, config, MAY_CHANGE))


def resume(
    t: Trained, checkpoints: Checkpoints, digest: str, mpp: float | None = None
) -> TrainState:
    """Loads the newest whole checkpoint; the state of step 0 where there is none.

    Args:
        t: the training; its tensors are overwritten.
        checkpoints: of the run.
        digest: of the data.
        mpp: scale of it.

    Raises:
        ConfigError: it is of another config or of other data, and `accept_changes` is not given.
        EosinError: there are checkpoints, and none is whole.
    """
    config = t.config
    state = _load(t, checkpoints)
    if state is None:
        skips = _read_skips(config.out)
        return TrainState(0, 0, digest, mpp, as_plain(config), skips=skips)
    changes = changed_keys(state.config, as_plain(config), MAY_CHANGE)
    if state.index_digest != digest:
        changes.append(
            f"the index of the {config.data}, or of columns that are used: {state.index_digest} → "
            f"{digest} of {config.source}"
        )
    _judge(config, t.world, changes)
    return replace(state, index_digest=digest, config=as_plain(config))


def roll_back(t: Trained, checkpoints: Checkpoints, spike: LossSpikeError) -> TrainState:
    """Goes back to the last checkpoint before a spike, and passes over the data that made it.

    Raises:
        EosinError: there were too many spikes, or there is no checkpoint before this one.
    """
    config, skips = t.config, _read_skips(t.config.out)
    said = (
        f"the loss rose from {spike.usual:.4g} to {spike.loss:.4g} after step {spike.good_steps} "
        f"and stayed up to step {spike.steps}"
    )
    if len(skips) >= config.spike.rollbacks:
        raise EosinError(
            f"{said}, after {len(skips)} spikes before it (spike.rollbacks={config.spike.rollbacks}"
            "): give a lower optim.lr and another out="
        )
    skips += ((spike.good_steps, spike.steps - spike.good_steps),)
    if t.world.leads:
        write_json(config.out / "skips.json", skips)
    t.world.barrier()
    state = _load(t, checkpoints)
    if state is None:
        raise EosinError(f"{said}, and there is no checkpoint from before: run it again")
    t.world.tell(
        f"warning: {said}: back to step {state.step}, and the {skips[-1][1]} batches from step "
        f"{spike.good_steps} on are passed over"
    )
    return state


def _load(t: Trained, checkpoints: Checkpoints) -> TrainState | None:
    """The newest checkpoint whose data is that of the run; those of what was left are removed."""
    tensors, skips = t.tensors(), _read_skips(t.config.out)
    at_most = None
    while True:
        state, passed_over = checkpoints.load_newest(tensors, at_most)
        for line in passed_over:
            t.world.tell(f"passed over a damaged checkpoint: {line}")
        if state is None:
            return None
        unknown = [start for start, n in skips if (start, n) not in state.skips]
        left_at = min(unknown, default=state.step)
        if state.step <= left_at:
            return replace(state, skips=skips)
        checkpoints.drop_after(left_at)
        at_most = left_at


def _judge(config: TrainerConfig, world: World, changes: list[str]) -> None:
    if not changes:
        return
    what = f"{config.out} holds a run that differs: {'; '.join(changes)}"
    if not config.accept_changes:
        raise ConfigError(
            f"{what}. Give it the same, or another out=, or accept_changes=true to go on all the "
            "same"
        )
    world.tell(f"warning: {what}; going on, as accept_changes=true says")


def _read_skips(out: Path) -> Skips:
    path = out / "skips.json"
    if not path.is_file():
        return ()
    try:
        return tuple((int(start), int(count)) for start, count in read_json(path))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise EosinError(
            f"{path} is not what eosin writes ({error}); restore or remove it"
        ) from error
