"""Judgements of machines that nobody here has, and checks that crash, hang or raise."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from eosin.launch.checks import Check, Finding, run_checks
from eosin.launch.checks_compile import Compiling
from eosin.launch.checks_compile import judge as judge_compiling
from eosin.launch.checks_devices import Devices, Gpu, is_compiled_for
from eosin.launch.checks_devices import judge as judge_devices
from eosin.launch.checks_disk import Disk, file_system
from eosin.launch.checks_disk import judge as judge_disk
from eosin.launch.checks_disk import look as look_at_disk
from eosin.launch.checks_images import Images
from eosin.launch.checks_images import judge as judge_images
from eosin.launch.checks_kernels import Kernel, attention_error, loss_error
from eosin.launch.checks_kernels import judge as judge_kernels
from eosin.launch.checks_machine import Machine, cgroup_limits
from eosin.launch.checks_machine import judge as judge_machine
from eosin.launch.checks_packages import Package, Packages
from eosin.launch.checks_packages import judge as judge_packages
from eosin.launch.checks_processes import Processes, Reduced, infiniband, links
from eosin.launch.checks_processes import judge as judge_processes
from eosin.launch.checks_slurm import Slurm, parse_config, parse_partitions
from eosin.launch.checks_slurm import judge as judge_slurm
from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.prototype_kernels import PlainKernels

MACHINE = Machine(
    cores=16, installed=64, quota=None, memory_gib=128.0, available_gib=100.0,
    memory_limit_gib=None, shared_gib=64.0, open_files=65_536, most_open_files=65_536,
    behind_s=-10.0, encoding="UTF-8", python="3.12.1",
)  # fmt: skip
H100 = Gpu(name="H100", memory_gib=80.0, free_gib=79.0, capability=(9, 0))
DEVICES = Devices(
    driver="580.1", driver_cuda=(13, 0), driver_gpus=("H100",), torch="2.13.0", torch_cuda=(13, 0),
    architectures=("sm_80", "sm_90", "compute_120"), gpus=(H100,), chosen="cuda in bf16",
)  # fmt: skip
DISK = Disk(
    folder=Path("/data"), kind="ext4", free_gb=900.0, free_files=10**7, write_mb_s=900.0,
    read_mb_s=2000.0, sync_ms=2.0, renames=True, locks=True,
)  # fmt: skip
COMPILING = Compiling(compilers=("g++",), has_headers=True, on_gpu=True, seconds=5.0)
IMAGES = Images(
    simplejpeg="1.9", opencv="5.0", rates={"simplejpeg": 3000.0}, apart=1.0, openslide="4.0.1"
)
PROCESSES = Processes(
    links=("eth0 100 Gb/s",), infiniband=(), variables=(), resolves=True, gpus=0, nccl="",
    gloo_reduced=Reduced(gb_s=1.0), nccl_reduced=None,
)  # fmt: skip
SLURM = Slurm(
    installed=True, version="25.05", max_array=1001, accounting=True,
    partitions=parse_partitions("gpu*|4|gpu:h100:8|2-00:00:00"),
)  # fmt: skip
PACKAGES = Packages(eosin="0.1.0", python="3.12", needed=(), optional={"wandb": "0.31"}, hub={})


def the_one(findings: list[Finding], name: str) -> Finding:
    (finding,) = (f for f in findings if f.name == name)
    return finding


def test_a_sound_machine_has_nothing_to_mend_or_to_note() -> None:
    findings = [
        *judge_machine(MACHINE), *judge_devices(DEVICES), *judge_disk(DISK),
        *judge_compiling(COMPILING), *judge_images(IMAGES), *judge_processes(PROCESSES),
        *judge_slurm(SLURM), *judge_packages(PACKAGES),
    ]  # fmt: skip
    assert [f for f in findings if f.verdict != "ok"] == []


@pytest.mark.parametrize(
    ("change", "name", "verdict", "words"),
    [
        ({"quota": 4.5}, "cores", "note", "workers=4"),
        ({"quota": 16.0}, "cores", "ok", ""),
        ({"available_gib": 1.0}, "memory", "mend", "too few"),
        ({"memory_limit_gib": 1.5}, "memory", "mend", "1.5 GiB are too few"),
        ({"memory_limit_gib": 6.0}, "memory", "note", "small model"),
        ({"shared_gib": 0.0625}, "/dev/shm", "note", "--shm-size"),
        ({"shared_gib": None}, "/dev/shm", "note", "--shm-size"),
        ({"open_files": 256}, "open files", "note", "ulimit -n"),
        ({"open_files": -1}, "open files", "ok", ""),
        ({"behind_s": 900 * 86_400.0}, "clock", "note", "NTP"),
        ({"encoding": "ANSI_X3.4-1968"}, "encoding", "mend", "PYTHONUTF8=1"),
        ({"encoding": "utf8"}, "encoding", "ok", ""),
    ],
)
def test_limits_of_a_machine(
    change: dict[str, object], name: str, verdict: str, words: str
) -> None:
    row = the_one(judge_machine(replace(MACHINE, **change)), name)  # type: ignore[arg-type]
    assert row.verdict == verdict and words in row.advice


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {}, (None, None)),
        (
            "0::/a/b",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000", "a/b/memory.max": "4096"},
            (2.5, 4096),
        ),
        (
            "5:cpu,cpuacct:/job\n4:memory:/job/step",
            {
                "cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000",
                "memory/job/step/memory.limit_in_bytes": "9223372036854771712",
                "memory/job/memory.limit_in_bytes": "1000",
            },
            (3.0, 1000),
        ),
        (
            "5:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            (None, None),
        ),
    ],
    ids=["none", "version 2", "version 1", "version 1 without"],
)  # fmt: skip
def test_limits_of_control_groups(
    membership: str, files: dict[str, str], expected: tuple[object, object], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert cgroup_limits(membership, tmp_path) == expected


def without_gpus(**change: object) -> Devices:
    return replace(DEVICES, gpus=(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "name", "verdict", "words"),
    [
        (without_gpus(driver_gpus=(), driver_cuda=None), "torch", "note", "train on a GPU"),
        (without_gpus(torch_cuda=None), "torch", "mend", "without constraints-cpu.txt"),
        (without_gpus(driver_cuda=(12, 4)), "torch", "mend", "built for CUDA 12.4"),
        (without_gpus(visible=""), "torch", "note", "unset CUDA_VISIBLE_DEVICES"),
        (without_gpus(), "torch", "mend", "says why not"),
        (replace(DEVICES, gpus=(replace(H100, capability=(7, 0)),)), "cuda:0", "mend", "no code"),
        (
            replace(DEVICES, architectures=("sm_75",), gpus=(replace(H100, capability=(7, 5)),)),
            "cuda:0", "note", "lacks bf16",
        ),
        (
            replace(DEVICES, gpus=(H100, replace(H100, free_gib=3.0))),
            "cuda:1", "note", "nvidia-smi",
        ),
        (replace(DEVICES, mig=True), "MIG", "note", "one slice"),
    ],
)  # fmt: skip
def test_drivers_and_gpus(devices: Devices, name: str, verdict: str, words: str) -> None:
    row = the_one(judge_devices(devices), name)
    assert row.verdict == verdict and words in row.advice


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((7, 0), ("sm_80", "compute_80"), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((10, 0), ("sm_90a", "sm_100"), True),
    ],
)
def test_code_for_a_gpu(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert is_compiled_for(capability, architectures) is runs


@pytest.mark.parametrize(
    ("change", "name", "verdict", "words"),
    [
        ({"free_gb": 0.2}, "free", "mend", "make room"),
        ({"free_gb": 8.0}, "free", "note", "ViT-L"),
        ({"free_files": 3}, "free", "mend", "no names are left"),
        ({"free_files": None}, "free", "ok", ""),
        ({"trouble": "it is full"}, "writing", "mend", "folder="),
        ({"write_mb_s": 9.0}, "speed", "note", "faster"),
        ({"sync_ms": 900.0}, "speed", "note", "faster"),
        ({"renames": False}, "promises", "mend", "write elsewhere"),
        ({"locks": False}, "promises", "note", "loader.cache"),
        ({"skew_s": -400.0}, "file clock", "note", "NTP"),
    ],
)
def test_disks(change: dict[str, object], name: str, verdict: str, words: str) -> None:
    row = the_one(judge_disk(replace(DISK, **change)), name)  # type: ignore[arg-type]
    assert row.verdict == verdict and words in row.advice


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    disk = look_at_disk(tmp_path / "not" / "there")
    assert disk.folder == tmp_path.resolve() and disk.renames and disk.locks and not disk.trouble
    assert disk.write_mb_s > 0 and disk.read_mb_s > 0 and disk.sync_ms > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_a_folder_that_takes_no_files_is_said() -> None:
    (room, writing) = judge_disk(look_at_disk(Path("/proc/self")))
    assert writing.verdict == "mend" and "/proc" in writing.found
    assert "proc" in room.found


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    mounts = "root / ext4 rw 0 0\nserver /data nfs4 rw 0 0\nx /data/my\\040disk xfs rw 0 0\n"
    kinds = {"/home": "ext4", "/data": "nfs4", "/data/a": "nfs4", "/data/my disk/b": "xfs"}
    assert {folder: file_system(Path(folder), mounts) for folder in kinds} == kinds


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        (replace(COMPILING, compilers=(), failure="InductorError"), "mend", "apt install g++"),
        (replace(COMPILING, has_headers=False, failure="Python.h"), "mend", "python3-dev"),
        (replace(COMPILING, failure="no"), "mend", "compile=none"),
        (replace(COMPILING, on_gpu=False, failure="no"), "note", "compile=none"),
    ],
)
def test_compilers(facts: Compiling, verdict: str, words: str) -> None:
    (row,) = judge_compiling(facts)
    assert row.verdict == verdict and words in row.advice


@pytest.mark.parametrize(
    ("kernel", "verdict", "words"),
    [
        (Kernel(kind="attention", name="sdpa", chosen=True, error=1e-6), "ok", ""),
        (Kernel(kind="attention", name="varlen", lacking="no CUDA"), "ok", ""),
        (Kernel(kind="losses", name="triton", chosen=True, error=0.5), "mend", "plain"),
        (Kernel(kind="losses", name="triton", chosen=True, error=float("nan")), "mend", "plain"),
        (Kernel(kind="attention", name="xformers", failure="oh"), "note", "attention=sdpa"),
    ],
)
def test_kernels(kernel: Kernel, verdict: str, words: str) -> None:
    (row,) = judge_kernels([kernel], "cpu in fp32", 1e-4)
    assert row.verdict == verdict and words in row.advice


def test_the_kernels_comparison_sees_a_wrong_kernel() -> None:
    cpu = torch.device("cpu")
    assert attention_error(sdpa_attention, cpu, torch.float32) < 1e-5
    assert loss_error(PlainKernels(), cpu) < 1e-5
    doubled = attention_error(lambda q, k, v, p: sdpa_attention(q, 2 * k, v, p), cpu, torch.float32)
    assert doubled > 0.1

    class Flat(PlainKernels):
        def log_sum_exp(self, a, b, bias, scale):  # type: ignore[no-untyped-def]
            return 1.1 * super().log_sum_exp(a, b, bias, scale)

    assert loss_error(Flat(chunk_elements=1024), cpu) > 1e-3


@pytest.mark.parametrize(
    ("images", "name", "words"),
    [
        (replace(IMAGES, apart=90.0), "decoders", "reinstall simplejpeg"),
        (replace(IMAGES, slide_failure="no"), "slides", "openslide-bin"),
    ],
)
def test_broken_readers_are_to_be_mended(images: Images, name: str, words: str) -> None:
    row = the_one(judge_images(images), name)
    assert row.verdict == "mend" and words in row.advice


@pytest.mark.parametrize(
    ("change", "name", "verdict", "words"),
    [
        ({"gloo_reduced": Reduced(failure="hung")}, "gloo", "mend", "GLOO_SOCKET_IFNAME"),
        ({"infiniband": ("mlx5_0:1 DOWN",)}, "network", "note", "NCCL_IB_HCA"),
        ({"resolves": False}, "network", "note", "/etc/hosts"),
        ({"variables": ("NCCL_SOCKET_IFNAME=ib0",)}, "network", "note", "ib0 names no"),
        ({"variables": ("NCCL_SOCKET_IFNAME=eth",)}, "network", "ok", ""),
        ({"variables": ("NCCL_SOCKET_IFNAME=^docker",)}, "network", "ok", ""),
        ({"nccl": "2.27", "gpus": 1}, "NCCL", "ok", ""),
        (
            {"nccl": "2.27", "gpus": 8, "nccl_reduced": Reduced(failure="hung")},
            "NCCL", "mend", "NCCL_SOCKET_IFNAME",
        ),
    ],
)  # fmt: skip
def test_networks(change: dict[str, object], name: str, verdict: str, words: str) -> None:
    row = the_one(judge_processes(replace(PROCESSES, **change)), name)  # type: ignore[arg-type]
    assert row.verdict == verdict and words in row.advice


def test_networks_are_read_from_sys(tmp_path: Path) -> None:
    for link, files in {
        "eth0": {"operstate": "up", "speed": "25000"},
        "wlan0": {"operstate": "down"},
        "lo": {"operstate": "unknown"},
        "eth1": {"operstate": "unknown", "speed": "-1"},
        "mlx5_0/ports/1": {"state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)"},
    }.items():
        (tmp_path / link).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / link / name).write_text(content + "\n")
    assert links(tmp_path) == ("eth0 25 Gb/s", "eth1")
    assert infiniband(tmp_path) == ("mlx5_0:1 ACTIVE 400 Gb/sec (4X NDR)",)


@pytest.mark.parametrize(
    ("slurm", "name", "verdict", "words"),
    [
        (Slurm(installed=False), "Slurm", "ok", ""),
        (Slurm(installed=True, silence="no answer"), "Slurm", "note", "SLURM_CONF"),
        (replace(SLURM, partitions=()), "partitions", "note", "account"),
        (replace(SLURM, partitions=parse_partitions("cpu|4|(null)|1:00:00")), "partitions", "note",
         "GRES"),
        (replace(SLURM, accounting=False), "accounting", "ok", ""),
    ],
)  # fmt: skip
def test_slurms(slurm: Slurm, name: str, verdict: str, words: str) -> None:
    row = the_one(judge_slurm(slurm), name)
    assert row.verdict == verdict and words in row.advice


def test_slurms_answers_are_read() -> None:
    text = (
        "Configuration data as of 2026-01-01T00:00:00\n"
        "AccountingStorageType   = accounting_storage/none\nMaxArraySize            = 1001\n"
        "SLURM_VERSION           = 22.05.8\n"
    )
    config = parse_config(text)
    assert config["MaxArraySize"] == "1001" and config["SLURM_VERSION"] == "22.05.8"
    main, gpu = parse_partitions("main*|2|(null)|infinite\ngpu|1|gpu:4|1-00:00:00\nrubbish\n")
    assert main.default and main.gres == "" and main.nodes == 2
    assert not gpu.default and gpu.gres == "gpu:4" and gpu.limit == "1-00:00:00"


@pytest.mark.parametrize(
    ("version", "failure", "words"),
    [
        ("", "", "pip install --upgrade 'torch>=2.10'"),
        ("2.9.1", "", "pip install --upgrade 'torch>=2.10'"),
        ("2.13.0+cu130", "ImportError: libcudart", "--force-reinstall"),
    ],
    ids=["missing", "old", "broken"],
)
def test_packages(version: str, failure: str, words: str) -> None:
    package = Package(asked=Requirement("torch>=2.10"), version=version, failure=failure)
    row = the_one(judge_packages(replace(PACKAGES, needed=(package,))), "torch")
    assert row.verdict == "mend" and words in row.advice


def test_a_new_package_is_sound_and_an_offline_hub_is_seen() -> None:
    package = Package(asked=Requirement("torch>=2.10"), version="2.13.0+cpu")
    packages = replace(PACKAGES, needed=(package,), hub={"HF_HUB_OFFLINE": "1"})
    rows = judge_packages(packages)
    assert "torch 2.13.0+cpu" in the_one(rows, "needed").found
    assert "cache alone" in the_one(rows, "HF hub").choice


def test_a_finding_that_is_not_ok_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="advice"):
        Finding("disk", "free", "0 GB", verdict="mend")


BROKEN = """
import os, signal, sys, time
from eosin.launch.checks import Finding
def segfaults(folder): os.kill(os.getpid(), signal.SIGSEGV)
def exits(folder): os._exit(3)
def hangs(folder): time.sleep(600)
def raises(folder): raise RuntimeError("no such thing")
def sound(folder):
    print("noise"), os.write(2, b"noise")
    return [Finding("e", "sound", str(folder))]
"""


def test_a_check_that_crashes_hangs_or_raises_costs_its_own_findings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_checks.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    checks = [
        Check("a", "broken_checks", "segfaults"),
        Check("b", "broken_checks", "hangs", needed=False),
        Check("c", "broken_checks", "raises"),
        Check("d", "broken_checks", "exits", needed=False),
        Check("f", "no_such_module"),
        Check("e", "broken_checks", "sound"),
    ]
    start = time.monotonic()
    found = {check.area: rows for check, rows in run_checks(checks, tmp_path, limit_s=10.0)}
    assert time.monotonic() - start < 60 and len(found) == len(checks)
    assert found["e"] == [Finding("e", "sound", str(tmp_path))]
    said = {area: rows[0] for area, rows in found.items()}
    assert "SIGSEGV" in said["a"].found and said["a"].verdict == "mend"
    assert "took over 10 s" in said["b"].found and said["b"].verdict == "note"
    assert "RuntimeError: no such thing" in said["c"].found and said["c"].verdict == "mend"
    assert "exit code 3" in said["d"].found and said["d"].verdict == "note"
    assert "no_such_module" in said["f"].found and said["f"].verdict == "mend"
    assert "noise" not in "".join(capfd.readouterr())
    assert not [p for p in _children() if "broken" in p]


def _children() -> list[str]:
    """Command lines of the processes that this one started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append((folder / "cmdline").read_text())
        except (OSError, IndexError):
            continue
    return found
