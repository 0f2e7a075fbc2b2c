"""Shards at a URL: fetched once, checked, bounded; and what is no URL is never opened."""

import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from fsspec.implementations.local import LocalFileSystem

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.data_curation import index_file, shard_cache
from eosin.data_curation.shard_cache import CacheConfig, RemoteFolder
from eosin.data_curation.shard_marker import read_marker
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.data_curation.shard_store import LocalFolder, open_store
from eosin.data_curation.shards import ShardConfig, shard
from eosin.launch.artefacts import file_digest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of four tiles."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    for number in range(20):
        rgb = np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8)
        (folder / "images" / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(rgb))
    out = folder / "shards"
    shard(ShardConfig(images=folder / "images", out=out, records_per_shard=4, workers=1))
    return out


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def remote(made: Path, tmp_path: Path) -> Path:
    """A copy that tests may spoil."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for path in made.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def cached(cache: CacheConfig) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.suffix == ".tar"}


def count_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the remote files that are opened from now on."""
    opened: list[str] = []
    plain = LocalFileSystem.open

    def noted(self: object, path: str, *args: object, **kwargs: object) -> object:
        opened.append(Path(path).name)
        return plain(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "open", noted)
    return opened


def test_a_url_reads_as_its_folder_and_fetches_each_file_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    opened = count_opens(monkeypatch)
    with ShardReader(made) as local, ShardReader(f"file://{made}", cache) as reader:
        assert reader.digest == local.digest and len(reader) == 20
        assert opened.count("index.parquet") == 1 and not cached(cache)  # none before it is read
        for row in np.random.default_rng(0).permutation(20).tolist() * 2:
            assert reader.read(row) == local.read(row)
        assert sorted(n for n in opened if n.endswith("tar")) == [f"{s:06d}.tar" for s in range(5)]
        assert cached(cache) == {
            f"{s['xxh3_128']}.tar" for s in read_marker(made)["shards"].values()
        }
    opened.clear()
    with ShardReader(f"file://{made}/", cache) as again:
        assert again.read(3) == local.read(3)
    assert not [name for name in opened if name != "shards.json"]


def read_all(url: str, cache: CacheConfig, answers: "multiprocessing.Queue[int]") -> None:
    opens = []
    plain = RemoteFolder._fetch

    def noted(self: RemoteFolder, *args: object) -> None:
        opens.append(args)
        plain(self, *args)

    RemoteFolder._fetch = noted  # type: ignore[method-assign]
    with ShardReader(url, cache) as reader:
        sizes = [len(reader.read(row)) for row in range(20)]
    answers.put(len(opens) if all(sizes) else -1)


def test_processes_share_what_one_has_fetched(made: Path, tmp_path: Path) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[int] = context.Queue()
    processes = [
        context.Process(target=read_all, args=(f"file://{made}", cache, answers)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    fetched = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert min(fetched) >= 0 and sum(fetched) == 6  # five shards and the index
    assert not [path for path in cache.folder.iterdir() if path.suffix == ".partial"]


def test_the_cache_keeps_what_was_used_last_and_open_files_stay_readable(
    made: Path, tmp_path: Path
) -> None:
    size = (made / "000000.tar").stat().st_size
    cache = CacheConfig(folder=tmp_path / "cache", max_gb=2.5 * size / 1e9)
    store = RemoteFolder(f"file://{made}", cache)
    digests = {name: f"{s['xxh3_128']}.tar" for name, s in store.marker["shards"].items()}
    first = store.open("000000.tar")
    os.close(store.open("000001.tar"))
    for name, age_s in (("000000.tar", 200), ("000001.tar", 100)):
        path = cache.folder / digests[name]
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    os.close(store.open("000000.tar"))  # used again: 1 is now the oldest
    os.close(store.open("000002.tar"))
    assert cached(cache) == {digests["000000.tar"], digests["000002.tar"]}
    os.close(store.open("000003.tar"))
    os.close(store.open("000004.tar"))
    assert digests["000000.tar"] not in cached(cache) and digests["000004.tar"] in cached(cache)
    assert os.pread(first, size, 0) == (made / "000000.tar").read_bytes()
    os.close(first)
    tiny = RemoteFolder(f"file://{made}", CacheConfig(folder=cache.folder, max_gb=1e-9))
    os.close(tiny.open("000001.tar"))
    assert cached(cache) == {digests["000001.tar"]}  # never the one that is needed


def test_threads_that_need_one_shard_wait_for_one_fetch(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_opens(monkeypatch)
    store = RemoteFolder(f"file://{made}", CacheConfig(folder=tmp_path / "cache"))
    threads = [
        threading.Thread(target=lambda: os.close(store.open("000002.tar"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened.count("000002.tar") == 1


def test_a_passing_failure_is_tried_again_and_a_lasting_one_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RemoteFolder(f"file://{made}", CacheConfig(folder=tmp_path / "cache"))
    plain, failures = type(store._files).open, [TimeoutError("slow"), OSError("reset")]

    def flaky(self: object, path: str, *args: object, **kwargs: object) -> object:
        if failures:
            raise failures.pop()
        return plain(self, path, *args, **kwargs)

    monkeypatch.setattr(type(store._files), "open", flaky)
    os.close(store.open("000000.tar"))
    failures += [OSError("connection reset by peer\nand more")] * 3
    with pytest.raises(
        EosinError, match=r"file://.*/000001.tar cannot be read \(3 attempts\)"
    ) as e:
        store.open("000001.tar")
    assert str(e.value).endswith("connection reset by peer") and not failures
    os.close(store.open("000001.tar"))


def test_what_was_fetched_is_checked(remote: Path, tmp_path: Path) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    store = RemoteFolder(f"file://{remote}", cache)
    data = bytearray((remote / "000001.tar").read_bytes())
    data[600] ^= 1
    (remote / "000001.tar").write_bytes(data)
    with pytest.raises(EosinError, match=r"000001.tar cannot be read .*checksum mismatch"):
        store.open("000001.tar")
    (remote / "000002.tar").write_bytes(data[:-512])
    with pytest.raises(EosinError, match=r"000002.tar cannot be read .*bytes where"):
        store.open("000002.tar")
    with pytest.raises(InputError, match=r"000002.tar has \d+ bytes where \d+ were written"):
        RemoteFolder(f"file://{remote}", cache)
    (remote / "000002.tar").unlink()
    with pytest.raises(InputError, match=r"000002.tar is missing"):
        store.open("000002.tar")
    with pytest.raises(InputError, match=r"000002.tar is missing"):
        RemoteFolder(f"file://{remote}", cache)
    assert not cached(cache) and not list(cache.folder.glob(".*.partial"))
    # A file of the cache that somebody cut is fetched anew.
    os.close(store.open("000003.tar"))
    kept = cache.folder / cached(cache).pop()
    kept.write_bytes(b"")
    os.close(store.open("000003.tar"))
    assert kept.read_bytes() == (remote / "000003.tar").read_bytes()
    (remote / "shards.json").unlink()
    with pytest.raises(InputError, match=r"shards.json does not exist: no finished shards"):
        RemoteFolder(f"file://{remote}", cache)


def flip(path: Path, at: int) -> None:
    """Damages one byte in place, as a disk does."""
    with path.open("rb+") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)


def test_a_copy_that_was_damaged_is_fetched_once_more(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    with ShardReader(remote) as local, ShardReader(f"file://{remote}", cache) as reader:
        expected = [local.read(row) for row in range(20)]
        assert [reader.read(row) for row in range(20)] == expected
        opened = count_opens(monkeypatch)
        for row in (5, 6):
            place = reader.index.locate(row)
            digest = reader.index.store.marker["shards"]["000001.tar"]["xxh3_128"]
            flip(cache.folder / f"{digest}.tar", place.offset + 9)
        assert [reader.read(row) for row in range(20)] == expected
        assert opened == ["000001.tar"]
    # What was damaged before it was hashed is so in every copy: no further one is fetched.
    flip(remote / "000001.tar", place.offset + 9)
    marker = (remote / "shards.json").read_text()
    (remote / "shards.json").write_text(marker.replace(digest, file_digest(remote / "000001.tar")))
    opened.clear()
    with ShardReader(f"file://{remote}", cache) as reader:
        for _ in range(2):
            with pytest.raises(RecordError, match=r"000001.tar, record '\d+': checksum mismatch"):
                reader.read(6)
        assert reader.read(5) == expected[5]
        assert [name for name in opened if name.endswith("tar")] == ["000001.tar"]


@pytest.mark.parametrize("hashed_bytes", [0, 1 << 20])
def test_a_damaged_copy_of_the_index_is_fetched_once_more(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed_bytes: int
) -> None:
    monkeypatch.setattr(index_file, "HASHED_BYTES", hashed_bytes)
    cache, url = CacheConfig(folder=tmp_path / "cache"), f"file://{remote}"
    with ShardReader(url, cache) as reader:
        expected = reader.index.table()
        (copy,) = cache.folder.glob("*.parquet")
    opened = count_opens(monkeypatch)
    size = copy.stat().st_size
    for at in (200, size - 5, size // 2, size - 300):  # pages and footer
        flip(copy, at)
        with ShardReader(url, cache) as reader:
            assert reader.index.table() == expected
            assert [reader.index.locate(row).size for row in range(20)] == expected[
                "size"
            ].to_pylist()
        assert opened.count("index.parquet") <= 1
        assert hashed_bytes == 0 or opened.count("index.parquet") == 1
        if "index.parquet" not in opened:  # a byte that nothing is read from
            flip(copy, at)
        opened.clear()
    # A damaged original: fetched twice, and nobody is told to write it here.
    digest = file_digest(remote / "index.parquet")
    flip(remote / "index.parquet", 200)
    marker = (remote / "shards.json").read_text()
    changed = marker.replace(digest, file_digest(remote / "index.parquet"))
    (remote / "shards.json").write_text(changed)
    with ShardReader(url, cache) as reader, pytest.raises(InputError) as error:
        reader.index.table()
    assert f"{url}/index.parquet is damaged" in str(error.value)
    assert "eosin shard" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat /etc/passwd",
        "pipe:cat /etc/passwd|",
        "s3://bucket/$(id)",
        "s3://bucket/${HOME}",
        "simplecache::s3://bucket/x",
        "filecache://x",
        "reference://x",
        "zip://x.zip",
        "nosuch://bucket/x",
        "s3://bucket/a|b",
        "s3://bucket/a\nb",
        "a::b",
        "nul\x00l",
    ],
)
def test_what_is_no_plain_place_is_refused_before_anything_is_opened(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    for name in ("fsspec.open", "fsspec.filesystem", "fsspec.core.url_to_fs", "subprocess.Popen"):
        monkeypatch.setattr(name, never)
    with pytest.raises(ConfigError, match=r"is refused|is no place that shards can be read from"):
        open_store(text, CacheConfig(folder=tmp_path / "cache"))


def test_paths_and_urls_are_told_apart(made: Path, tmp_path: Path) -> None:
    cache = CacheConfig(folder=tmp_path / "cache")
    assert isinstance(open_store(made), LocalFolder)
    assert isinstance(open_store(f"file://{made}"), LocalFolder)
    for url in (f"file://{made}", Path(f"file://{made}")):  # a Path keeps one slash of several
        store = open_store(url, cache)
        assert isinstance(store, RemoteFolder) and store.url == f"file://{made}"
    with pytest.raises(ConfigError, match=r"s3://bucket/x needs a cache on this machine"):
        open_store("s3://bucket/x")
    odd = tmp_path / "a{b}::c"
    odd.symlink_to(made)
    assert isinstance(open_store(odd), LocalFolder)  # a folder that is there may be called so
    with pytest.raises(InputError, match="the folder does not exist"):
        open_store("nowhere/at/all")
    with pytest.raises(ValueError, match="max_gb must be positive, not 0"):
        CacheConfig(folder=tmp_path, max_gb=0)
