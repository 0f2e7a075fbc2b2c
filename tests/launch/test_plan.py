"""`eosin plan`: its memory against real steps, its traffic against real ranks, its arithmetic."""

import json
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eosin.configs.errors import ConfigError
from eosin.configs.load import load_config, to_yaml
from eosin.launch.bench_sides import FastStep
from eosin.launch.cards import card_called
from eosin.launch.cli import main
from eosin.launch.plan import CORE_TILES, GIB, PlanConfig, make_plan
from eosin.launch.process import World, join_world
from eosin.launch.stopwatch import NoWatch, memory_by_part, state_bytes
from eosin.pretrain.batch import Batch, Inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Losses
from eosin.pretrain.gradients import take_gradients
from eosin.pretrain.local_part import local
from eosin.pretrain.optim import (
    clip_gradients,
    forget_gradients,
    hand_gradients,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.rates import Rates
from eosin.pretrain.setup import Training, set_up
from eosin.pretrain.step_guard import StepGuard
from eosin.pretrain.step_plan import blank_batch, largest_step, plan_step
from eosin.pretrain.traffic_meter import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from eosin.pretrain.valueless import no_processes

TINY = [
    "model={width: 64, depth: 3, heads: 2, patch_px: 8, image_px: 32, registers: 1}",
    "objective.head={prototypes: 512, hidden: 64, bottleneck: 32}",
    "augment={global_px: 32, local_px: 16, n_local: 2}", "threads=1", "device=cpu", "steps=40",
    "group_size=2",
]  # fmt: skip
RECIPES = {
    "sinkhorn": ["objective.spread={kind: kde}", "masks.exact=true", "model.drop_path=0.3"],
    "centre": ["objective.targets=centre", "objective.patch_head={prototypes: 300, hidden: 64}"],
    "patches": [
        "objective.ibot=0", "objective.jepa={weight: 1.0, depth: 1, width: 32, heads: 2}",
        "objective.gram={weight: 1.0, start: 2}", "model.positions=rope", "model.ffn=swiglu",
    ],
}  # fmt: skip
CPU = torch.device("cpu")


def config_of(*overrides: str, files: tuple[str, ...] = ()) -> PlanConfig:
    return load_config(PlanConfig, files, overrides)


def batch_of(config: PretrainConfig, world: World | None = None) -> Batch:
    plan = config.plan_of(world or World())
    batch = blank_batch(plan, largest_step(config, plan))
    for crops in batch.images:
        crops.copy_(torch.randint(256, crops.shape, dtype=torch.uint8))
    return batch


def real_peak(config: PretrainConfig, folder: Path) -> int:
    """Bytes at the peak of a step that is not the first, by what torch's allocator reports."""
    torch.set_num_threads(1)
    side, batch = FastStep(config, CPU, torch.float32, folder), batch_of(config)
    side.take(batch, NoWatch())
    side.optimizer.zero_grad()
    state, watch = state_bytes(side.model, side.optimizer), memory_by_part(CPU)
    side.take(batch, watch)
    return state + max(watch.peaks.values())


@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_that_of_a_real_step(recipe: str, batch_size: int, tmp_path: Path) -> None:
    config = config_of(*TINY, *RECIPES[recipe], f"batch_size={batch_size}")
    found = plan_step(config, "cpu", torch.float32)
    assert found.peak.total == pytest.approx(real_peak(config, tmp_path), rel=0.03)
    assert sum(found.state.values()) < found.peak.total


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_is_not_held(mode: str, tmp_path: Path) -> None:
    sizes = [*TINY, "model.depth=6", "batch_size=16", f"recompute={mode}"]
    found = plan_step(config_of(*sizes), "cpu", torch.float32)
    assert found.peak.total == pytest.approx(real_peak(config_of(*sizes), tmp_path), rel=0.03)
    kept = plan_step(config_of(*sizes, "recompute=none"), "cpu", torch.float32)
    assert found.peak.labels["activations"] < 0.7 * kept.peak.labels["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("recipe", ["eosin", "dinov2"])
@pytest.mark.parametrize("batch_size", [2, 6])
def test_memory_of_published_sizes(recipe: str, size: str, batch_size: int, tmp_path: Path) -> None:
    """In a process of its own, whose resident memory is looked at, too."""
    files = (f"pretrain/{recipe}", f"size/{size}")
    config = config_of(f"batch_size={batch_size}", "group_size=2", files=files)
    file, result = tmp_path / "config.yaml", tmp_path / "real.json"
    file.write_text(to_yaml(config))
    with ranks_of(1, [__file__, "memory", str(file), str(result)], tmp_path / "logs") as [rank]:
        assert rank.ends(1200) == 0, rank.said()
    real = json.loads(result.read_text())
    found = plan_step(config, "cpu", torch.float32).peak.total
    print(f"{recipe} {size} {batch_size}: {found / 2**20:.0f} MiB planned, real {real}")
    assert found == pytest.approx(real["allocated"], rel=0.1)
    assert 0.9 * found < real["resident"] < 1.35 * found  # the allocator keeps what was freed


LAYOUTS = ("ddp", "fsdp")
OPERATORS = {
    ALL_REDUCE: "allreduce_",
    ALL_GATHER: "_allgather_base_",
    REDUCE_SCATTER: "_reduce_scatter_base_",
}


def test_traffic_and_memory_are_those_of_real_ranks(tmp_path: Path) -> None:
    configs = {}
    for layout in LAYOUTS:
        overrides = [*TINY, *RECIPES["sinkhorn"], "batch_size=16", f"parallel={layout}"]
        configs[layout] = load_config(PlanConfig, (), overrides)
        (tmp_path / f"{layout}.yaml").write_text(to_yaml(configs[layout]))
    files = [str(tmp_path / f"{layout}.yaml") for layout in LAYOUTS]
    with ranks_of(2, [__file__, "traffic", *files], tmp_path / "logs") as ranks:
        for rank in ranks:
            assert rank.ends() == 0, rank.said()
    for layout in LAYOUTS:
        real = json.loads((tmp_path / f"{layout}.yaml.json").read_text())
        found = plan_step(configs[layout], "cpu", torch.float32, ranks=2)
        assert found.parallel == layout
        planned: Counter[str] = Counter()
        for one in found.collectives:
            planned[OPERATORS[one.kind]] += one.payload
        assert dict(planned) == real["bytes"]
        calls = Counter(OPERATORS[one.kind] for one in found.collectives)
        assert dict(calls) == real["calls"]
        assert found.peak.total == pytest.approx(real["allocated"], rel=0.1)


def test_shards_of_hybrid_are_those_of_its_copies() -> None:
    sizes = [*TINY, "batch_size=32"]
    whole = plan_step(config_of(*sizes, "parallel=ddp"), "cpu", torch.float32, ranks=8)
    sharded = plan_step(config_of(*sizes, "parallel=fsdp"), "cpu", torch.float32, ranks=8)
    both = plan_step(config_of(*sizes, "parallel=hybrid"), "cpu", torch.float32, ranks=8, on_node=4)
    assert both.state["weights"] == pytest.approx(whole.state["weights"] / 4, rel=0.02)
    assert sharded.state["weights"] == pytest.approx(whole.state["weights"] / 8, rel=0.06)
    members = {(one.kind, one.members) for one in both.collectives if one.part == "backward"}
    assert (REDUCE_SCATTER, (0, 1, 2, 3)) in members and (ALL_REDUCE, (0, 4)) in members
    assert (ALL_GATHER, (0, 1, 2, 3)) in members
    assert whole.state_bytes == sharded.state_bytes == both.state_bytes


def test_the_plan_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        *TINY, "batch_size=256", "gpus=64", "gpu=H100", "mfu=0.5", "price=3", "tile_kb=20",
        "shard_records=1000", "tiles=100000", "steps=1000",
    ]  # fmt: skip
    file = tmp_path / "plan.json"
    assert main(["plan", *sizes, "--json", str(file)]) == 0
    p, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert p["batch_of_gpu"] == 4 and p["layout"] == "ddp" and p["fits"] and not p["remedies"]
    assert p["compute_s"] == pytest.approx(4 * p["gflops_of_tile"] / (0.5 * 989e3), rel=1e-3)
    assert p["step_s"] == pytest.approx(
        max(p["compute_s"], p["hidden_traffic_s"]) + p["waited_traffic_s"]
    )
    assert p["tiles_per_s"] == pytest.approx(256 / p["step_s"])
    assert p["gpu_hours"] == pytest.approx(64 * 1000 * p["step_s"] / 3600)
    assert p["cost"] == pytest.approx(3 * p["gpu_hours"])
    assert p["shards"] == 100 and p["shards_tb"] == pytest.approx(0.002)
    assert p["epochs"] == pytest.approx(2.56)
    assert p["cores_of_node"] == pytest.approx(p["tiles_per_s"] / 8 / CORE_TILES["worker"])
    assert p["peak_gib"] == pytest.approx(sum(p["memory_gib"].values()))
    reduced = {flow["part"]: flow for flow in p["traffic"] if flow["kind"] == ALL_REDUCE}
    trained = 4 * (p["encoder_parameters"] + p["head_parameters"]) / 1e9
    assert reduced["gradients"]["payload_gb"] == pytest.approx(trained)
    assert reduced["gradients"]["sent_gb"] == pytest.approx(2 * 63 / 64 * trained)
    assert f"{p['tiles_per_s']:,.0f} tiles/s" in shown and "fits" in shown


def test_what_does_not_fit_is_said_with_a_remedy() -> None:
    sizes = [*TINY, "model.depth=8", "batch_size=256", "gpus=8"]
    roomy = make_plan(config_of(*sizes, "gpu_gib=80"))
    assert roomy.fits
    tight = make_plan(config_of(*sizes, f"gpu_gib={roomy.peak_gib}"))
    assert not tight.fits and tight.remedies
    assert all(peak <= roomy.peak_gib for peak in tight.remedies.values())


def test_bandwidth_is_that_of_the_links_a_group_uses() -> None:
    sizes = [*TINY, "batch_size=32", "gpus=16", "latency_us=0", "network_gbs=10"]
    near = make_plan(config_of(*sizes, "gpus_per_node=16", "link_gbs=100"))
    far = make_plan(config_of(*sizes, "gpus_per_node=4", "link_gbs=100"))
    [a], [b] = ([flow for flow in p.traffic if flow.part == "gradients"] for p in (near, far))
    assert a.sent_gb == b.sent_gb and a.seconds == pytest.approx(a.sent_gb / 100)
    assert b.seconds == pytest.approx(b.sent_gb / 40)  # four ports a node


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu=Abacus"], "no figures for gpu=Abacus; there are B200"),
        (["gpus=0"], "gpus=0 must be at least 1"),
        (["gpus=3"], "batch_size=64 must be a multiple of"),
        (["mfu=1.5"], "mfu=1.5 is a share"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *TINY, "batch_size=64", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_cards_are_found_by_what_drivers_call_them() -> None:
    assert card_called("NVIDIA H100 80GB HBM3").name == "H100"
    assert card_called("NVIDIA A100-SXM4-40GB").name == "A100 40GB"
    assert card_called("H100 PCIe").tflops == 756
    with pytest.raises(ConfigError, match="no figures"):
        card_called("MI300X")


def test_worlds_without_processes_leave_nothing_behind() -> None:
    for _ in range(2):
        with no_processes(64, 8) as world:
            assert (world.size, world.local_size) == (64, 8)
        assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_giant_on_a_thousand_ranks_takes_less_than_a_minute() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    files = ("pretrain/eosin", "size/giant")
    p = make_plan(config_of("batch_size=32768", "gpus=1024", "recompute=full", files=files))
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 60 and p.peak_gib * GIB > 20 * p.encoder_parameters


def measure_memory(file: str, result: str) -> None:
    config = load_config(PlanConfig, [file])
    quiet = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    torch.set_num_threads(1)
    side, batch = FastStep(config, CPU, torch.float32, Path(result).parent), batch_of(config)
    side.take(batch, NoWatch())
    side.take(batch, NoWatch())
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    del side
    found = {"resident": peak - quiet, "allocated": real_peak(config, Path(result).parent)}
    Path(result).write_text(json.dumps(found))


class Counted(TorchDispatchMode):
    """Calls, and bytes of the largest tensor of each, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls[func._opname] += 1
            self.bytes[func._opname] += max(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def measure_traffic(files: list[str]) -> None:
    torch.set_num_threads(1)
    with join_world(CPU, 120) as world:
        for file in files:
            config = load_config(PlanConfig, [file])
            t = set_up(config, CPU, torch.float32, world)
            take = RealStep(t, Path(file).parent)
            batch = batch_of(config, world)
            for _ in range(2):  # after the first one DDP makes its buckets anew
                take(batch)
            tensors = [*t.model.parameters(), *t.model.buffers()]
            tensors += [m for state in t.optimizer.state.values() for m in state.values()]
            if t.layout.name == "ddp":  # its buckets
                tensors += t.model.student.parameters()
            watch = memory_by_part(CPU)
            watch.switch("step")
            take(batch)
            watch.stop()
            with Counted() as counted:
                take(batch)
            if world.leads:
                found = {
                    "bytes": dict(counted.bytes),
                    "calls": dict(counted.calls),
                    "allocated": sum(local(x).nbytes for x in tensors) + watch.peaks["step"],
                }
                Path(f"{file}.json").write_text(json.dumps(found))
            world.barrier()


class RealStep:
    """The body of the trainer's loop."""

    def __init__(self, t: Training, folder: Path) -> None:
        self.t, self.parts = t, dict(t.model.student.named_children())
        self.inputs = Inputs(CPU, t.config.mean, t.config.std)
        self.guard = StepGuard(
            folder / f"bad_{t.world.rank}.jsonl", limit=3, count=0, first_step=0,
            terms=Losses._fields, modules=list(self.parts), world=t.world,
        )  # fmt: skip

    def __call__(self, batch: Batch) -> None:
        t, optim, student = self.t, self.t.config.optim, self.t.model.student
        rates = Rates.at(t.config, batch.step)
        losses, outputs = take_gradients(t, batch, rates, self.inputs)
        norms = clip_gradients(
            self.parts.values(), optim.clip_norm, optim.clip, t.layout.over_shards
        )
        bad = self.guard.judge(batch.step, batch.rows, torch.stack(losses), norms)
        set_rates(t.optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
        hand_gradients(student)
        step_unless_bad(t.optimizer, bad)
        forget_gradients(student)
        t.model.update_teacher(outputs, rates.momentum, bad)
        t.model.record_use(batch.step, outputs, bad)


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        measure_memory(*sys.argv[2:])
    else:
        measure_traffic(sys.argv[2:])
