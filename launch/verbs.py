"""The verbs of the `eosin` command: where each one's config and function live.

A row holds names, not modules: `eosin --help` imports none of them.
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One verb: where its config and its function live."""

    module: str
    schema: str
    """Name of the config dataclass in `module`."""
    function: str
    """Name of the function in `module` that takes the config; raises `EosinError` on failure."""
    summary: str
    example: str
    positional: str = ""
    """Config key that a bare argument fills."""
    collects: str = ""
    """Config key, a list, that bare arguments fill."""
    plan: str = ""
    """Name of the function in `module` that answers ``--dry-run`` with a text."""
    options: tuple[str, ...] = ()
    """Config keys that ``--key VALUE`` fills, too."""
    ranks: bool = False
    """Whether it runs as several processes that share the work."""
    pieces: str = ""
    """Name of the function in `module` that lists what is left to do, by piece, with its size; the
    config key `only` then names a file of pieces to do."""
    tail: str = ""
    """Config key that takes what follows ``--``."""

    def load_schema(self) -> type[Any]:
        """The config dataclass; imports the module."""
        schema: type[Any] = getattr(importlib.import_module(self.module), self.schema)
        return schema


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "eosin.launch.demo",
        "DemoConfig",
        "demo",
        "synthetic slides, then the whole chain, to a report; minutes on a CPU",
        "eosin demo",
        plan="plan",
    ),
    "tile": Verb(
        "eosin.data_curation.tiles",
        "TileConfig",
        "tile",
        "slides to slides.parquet, tiles.parquet and overlays",
        "eosin tile slides=/data/slides out=tiles mpp=0.5",
        plan="plan",
        pieces="pieces",
    ),
    "shard": Verb(
        "eosin.data_curation.shards",
        "ShardConfig",
        "shard",
        "selected tiles of slides, or tile images, to WebDataset shards with an index",
        "eosin shard images=/data/tiles out=shards",
        plan="plan",
    ),
    "shard verify": Verb(
        "eosin.data_curation.verify",
        "VerifyConfig",
        "verify",
        "check every shard and record against its checksum, and name the damaged ones",
        "eosin shard verify shards",
        positional="shards",
    ),
    "shard energon": Verb(
        "eosin.data_curation.energon_index",
        "EnergonConfig",
        "write_energon",
        "index finished shards for Megatron-Energon, without reading them",
        "eosin shard energon shards",
        positional="shards",
    ),
    "embed": Verb(
        "eosin.data_curation.embed_tiles",
        "EmbedConfig",
        "embed",
        "tiles of slides, images or shards to a feature store, by any encoder",
        "eosin embed tiles=curated encoder=builtin:stain-texture out=curated/features",
        plan="plan",
        ranks=True,
    ),
    "extract": Verb(
        "eosin.data_curation.extract",
        "ExtractConfig",
        "extract",
        "slides to one file of features each, for slide-level code: h5 as TRIDENT and CLAM, …",
        "eosin extract slides=/data/slides encoder=my_encoder out=features tile.mpp=0.5",
        plan="plan",
        ranks=True,
    ),
    "extract slides": Verb(
        "eosin.pretrain.slide.extract",
        "ExtractSlidesConfig",
        "extract_slides",
        "bags to one vector a slide or case by a slide encoder; contextual tokens and latents too",
        "eosin extract slides encoder=runs/slides/encoder 'bags=[uni_bags]' out=vectors",
    ),
    "bags": Verb(
        "eosin.data_curation.import_bags",
        "BagsConfig",
        "make_bags",
        "files of features of TRIDENT, CLAM, STAMP, AtlasPatch, slide2vec or ours to checked bags",
        "eosin bags files=/data/features_uni out=bags mpp=0.5 table=slides.csv",
        plan="plan",
    ),
    "cluster": Verb(
        "eosin.data_curation.cluster",
        "ClusterConfig",
        "cluster",
        "features to clusters, clusters of clusters, and clusters inside slides",
        "eosin cluster features=curated/features out=curated/clusters 'levels=[1000,100]'",
        plan="plan",
        ranks=True,
    ),
    "dedupe": Verb(
        "eosin.data_curation.dedupe",
        "DedupeConfig",
        "dedupe",
        "tiles that repeat another, and slides scanned twice, to a table that sample leaves out",
        "eosin dedupe prints=curated/prints tiles=curated clusters=curated/clusters "
        "out=curated/duplicates.parquet",
        plan="plan",
    ),
    "sample": Verb(
        "eosin.data_curation.sample",
        "SampleConfig",
        "sample",
        "a balanced draw of tiles over strata and clusters, with caps, weights and a review",
        "eosin sample --config sample/hierarchical tiles=curated clusters=curated/clusters "
        "total=100000 out=curated/selection.parquet",
        plan="plan",
    ),
    "review": Verb(
        "eosin.data_curation.review_page",
        "ReviewPageConfig",
        "review_page",
        "clusters as a page on which a pathologist names, merges, weighs and rejects them",
        "eosin review tiles=curated clusters=curated/clusters level=2 out=curated/review.html",
    ),
    "curate": Verb(
        "eosin.data_curation.curate",
        "CurateConfig",
        "curate",
        "slides to shards in one resumable command: tile, select, shard",
        "eosin curate slides=/data/slides out=curated tile.mpp=0.5",
        plan="plan",
        pieces="pieces",
    ),
    "pretrain": Verb(
        "eosin.launch.training",
        "TrainingConfig",
        "pretrain",
        "shards to a run folder with an exported encoder; resumes when the folder exists",
        "eosin pretrain --config pretrain/smoke shards=curated/shards out=runs/first",
        plan="plan",
        ranks=True,
    ),
    "pretrain slides": Verb(
        "eosin.pretrain.slide.train",
        "SlideConfig",
        "pretrain_slides",
        "bags of tile features to a slide encoder, by the same trainer; resumes as it does",
        "eosin pretrain slides --config slide/moozy 'bags.stores=[uni_bags]' out=runs/slides",
        plan="plan",
        ranks=True,
    ),
    "plan": Verb(
        "eosin.launch.plan",
        "PlanConfig",
        "plan",
        "a training's memory, traffic, time and cost on any number of GPUs, before it runs",
        "eosin plan --config pretrain/eosin --config size/large batch_size=2048 gpus=64 gpu=A100",
        options=("json",),
    ),
    "plan curate": Verb(
        "eosin.launch.plan_curation",
        "PlanCurateConfig",
        "plan_curation",
        "a curation's core-hours, GPU-hours, storage and cost by stage, before it runs",
        "eosin plan curate slides=20000 like=pilot total=50000000 cores=256 gpus=8",
        options=("json",),
    ),
    "weights": Verb(
        "eosin.pretrain.weights",
        "WeightsConfig",
        "show_weights",
        "what weights are: layout, every tensor accounted for, and the settings that take them",
        "eosin weights /data/dinov2_vitl14_reg4_pretrain.pth",
        positional="source",
    ),
    "explain": Verb(
        "eosin.eval.explain",
        "ExplainConfig",
        "explain",
        "what an encoder sees on a slide: patch tokens as colours, attention, nearest tiles",
        "eosin explain encoder=my_encoder tiles=curated slide=CMU-1 out=pictures",
    ),
    "export": Verb(
        "eosin.eval.release",
        "ReleaseConfig",
        "release",
        "a run to an encoder folder for bare timm, with a card, checksums and a golden tile",
        "eosin export run=runs/first out=my_encoder licence=apache-2.0 'scores=[runs/first/eval]'",
    ),
    "export verify": Verb(
        "eosin.pretrain.verify_encoder",
        "VerifyEncoderConfig",
        "verify_encoder",
        "whether an encoder folder is whole and gives its features on this machine",
        "eosin export verify my_encoder",
        positional="encoder",
    ),
    "export push": Verb(
        "eosin.eval.push",
        "PushConfig",
        "push",
        "an encoder folder to a hub, after all its checks; says what it would do until really=true",
        "eosin export push my_encoder repo=my-org/my-encoder",
        positional="encoder",
    ),
    "eval": Verb(
        "eosin.eval.run",
        "EvalConfig",
        "evaluate",
        "encoder on labelled tiles to results.json and report.html, floors beside it",
        "eosin eval encoder=runs/first/encoder task.tiles=/data/labels.csv out=runs/first/eval",
        plan="plan",
    ),
    "eval bags": Verb(
        "eosin.eval.bags",
        "BagsConfig",
        "evaluate_bags",
        "features of slides to verdicts on slides: mean pooling, AB-MIL, TransMIL, with attention",
        "eosin eval bags 'features=[curated/features]' labels=slides.csv out=runs/first/bags",
    ),
    "eval survival": Verb(
        "eosin.eval.survival",
        "SurvivalConfig",
        "evaluate_survival",
        "features of slides to patients' risk in nested folds: Cox or hazards, C with intervals",
        "eosin eval survival 'features=[uni_bags]' table=patients.csv out=runs/first/survival",
    ),
    "eval transfer": Verb(
        "eosin.eval.transfer",
        "TransferConfig",
        "evaluate_transfer",
        "heads of every cohort of slides on every other one: a matrix with paired losses",
        "eosin eval transfer features=uni_bags labels=slides.csv out=runs/first/transfer",
    ),
    "eval regression": Verb(
        "eosin.eval.regression",
        "RegressionConfig",
        "evaluate_regression",
        "numbers of tiles (expression of genes) by ridge, with and without PCA, floors beside it",
        "eosin eval regression encoder=runs/first/encoder tiles=/data/genes.csv "
        "'targets=[gene_*]' out=runs/first/genes",
    ),
    "eval aligned": Verb(
        "eosin.eval.aligned",
        "AlignedConfig",
        "evaluate_aligned",
        "the same places under several scanners and stainings: cosine and top-k, as PLISM has them",
        "eosin eval aligned encoder=runs/first/encoder tiles=/data/plism.csv out=runs/first/plism",
    ),
    "eval compare": Verb(
        "eosin.eval.compare",
        "CompareConfig",
        "compare_encoders",
        "encoders against each other on shared tasks: paired intervals, permutation tests, Holm",
        "eosin eval compare runs/first/eval runs/second/eval out=runs/compared",
        collects="results",
    ),
    "eval leaderboard": Verb(
        "eosin.eval.leaderboard",
        "LeaderboardConfig",
        "make_leaderboard",
        "many evaluations as one table of encoders by tasks, with floors and published figures",
        "eosin eval leaderboard runs/*/eval out=runs/leaderboard",
        collects="results",
    ),
    "eval reproduce": Verb(
        "eosin.eval.reproduce",
        "ReproduceConfig",
        "reproduce",
        "run an evaluation again and hold every number against its old one",
        "eosin eval reproduce runs/first/eval",
        positional="results",
    ),
    "watch": Verb(
        "eosin.eval.watch_exports",
        "WatchConfig",
        "watch",
        "score each export of a running training (probe.where=job) as it appears, until it is done",
        "eosin watch run=runs/first probe.tiles=/data/labels.csv",
        plan="plan",
    ),
    "stain": Verb(
        "eosin.pretrain.stain_fit",
        "StainFitConfig",
        "fit_stain",
        "the stain statistics of a set of shards, as YAML for augment.stain",
        "eosin stain shards=curated/shards out=stain.yaml",
    ),
    "stain library": Verb(
        "eosin.data_curation.stain_library",
        "StainLibraryConfig",
        "make_library",
        "how the slides of a curated set are stained, as a few reference conditions",
        "eosin stain library tiles=curated out=stains.json",
    ),
    "launch": Verb(
        "eosin.launch.submit",
        "LaunchConfig",
        "launch",
        "any verbs as jobs on Slurm, or here as several processes; queued again until done",
        "eosin launch nodes=4 gpus=8 -- pretrain shards=shards out=runs/big -- export run=runs/big",
        plan="plan",
        tail="command",
    ),
    "launch status": Verb(
        "eosin.launch.jobs",
        "StatusConfig",
        "status",
        "how the jobs of a launch stand",
        "eosin launch status launches/pretrain-1",
        positional="folder",
    ),
    "launch logs": Verb(
        "eosin.launch.jobs",
        "LogsConfig",
        "logs",
        "the end of the logs of a launch's jobs",
        "eosin launch logs launches/pretrain-1 stage=pretrain rank=0",
        positional="folder",
    ),
    "launch cancel": Verb(
        "eosin.launch.jobs",
        "CancelConfig",
        "cancel",
        "end the jobs of a launch, waiting or running",
        "eosin launch cancel launches/pretrain-1",
        positional="folder",
    ),
    "bench balance": Verb(
        "eosin.launch.bench_balance",
        "BenchBalanceConfig",
        "bench_balance",
        "a rare class after training on a balanced draw, against a uniform one",
        "eosin bench balance --json balance.json",
        options=("json",),
    ),
    "bench data": Verb(
        "eosin.launch.bench_data",
        "BenchDataConfig",
        "bench_data",
        "tiles/s a core from JPEG to crops by stage, against Pillow, torchvision and webdataset",
        "eosin bench data --json data.json",
        plan="plan",
        options=("json",),
    ),
    "bench step": Verb(
        "eosin.launch.bench_step",
        "BenchStepConfig",
        "bench_step",
        "a training step against a plain one: tiles/s, FLOP/s, memory, and time by part",
        "eosin bench step model.drop_path=0.3 threads=1 --json step.json",
        plan="plan",
        options=("json",),
    ),
    "bench kmeans": Verb(
        "eosin.launch.bench_kmeans",
        "BenchKmeansConfig",
        "bench_kmeans",
        "k-means to the same inertia, against plain Lloyd with k-means++ and faiss",
        "eosin bench kmeans --json kmeans.json",
        options=("json",),
    ),
    "bench tile": Verb(
        "eosin.launch.bench_tile",
        "BenchTileConfig",
        "bench_tile",
        "tiles/s a core from a slide, against the usual loop of OpenSlide and Pillow",
        "eosin bench tile slide=/data/slides/one.svs --json tile.json",
        options=("json",),
    ),
    "bench probes": Verb(
        "eosin.launch.bench_probes",
        "BenchProbesConfig",
        "bench_probes",
        "linear sweep, few-shot, kNN and bootstrap against the loops that are usually run",
        "eosin bench probes --json probes.json",
        options=("json",),
    ),
    "bench slides": Verb(
        "eosin.launch.bench_slides",
        "BenchSlidesConfig",
        "bench_slides",
        "a step of slide self-distillation, against padded grids with a dense distance bias",
        "eosin bench slides --json slides.json",
        options=("json",),
    ),
    "bench masks": Verb(
        "eosin.launch.bench_masks",
        "BenchMasksConfig",
        "bench_masks",
        "masks of tissue, pen and folds, and blur, against the truth of synthetic slides",
        "eosin bench masks --json masks.json",
        options=("json",),
    ),
    "bench layouts": Verb(
        "eosin.launch.bench_layouts",
        "BenchStepConfig",
        "bench_layouts",
        "the same step alone, replicated and sharded on one rank; and what a checkpoint costs it",
        "eosin bench layouts --config bench/step_gpu --json layouts.json",
        options=("json",),
    ),
    "doctor": Verb(
        "eosin.launch.doctor",
        "DoctorConfig",
        "doctor",
        "this machine: what eosin finds and would choose on it, and what to mend",
        "eosin doctor folder=runs --json doctor.json",
        options=("json",),
    ),
}
