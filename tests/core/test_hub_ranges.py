"""Only a part's bytes come from a hub: the real client's session against a server on loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from loopback_hub import COMMIT, Asked, Fault, LoopbackHub
from safetensors.torch import load_file, save_file

from splitlearn_core.builder import build_part
from splitlearn_core.errors import (
    CheckpointError,
    FetchError,
    ModelSourceError,
    StorageError,
)
from splitlearn_core.headers import TensorInfo, read_header
from splitlearn_core.loading.fetch import FetchOptions
from splitlearn_core.loading.files import FolderFiles
from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_source import open_hub_source
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.opening import open_source
from splitlearn_core.loading.retries import Patience
from splitlearn_core.loading.sources import TensorSource
from splitlearn_core.loading.stages import LoadStage
from splitlearn_core.plan import SplitPlan
from splitlearn_core.skeleton import load_config

REPO = "someone/model"
LAYERS = 12
ROWS, COLUMNS = 64, 128
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Requests that are small, reported and recorded at once: each byte's way can be told.
EAGER = {"least_request": 24_000, "most_request": 24_000, "record_bytes": 1, "report_bytes": 1}


def tensors_of_model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"embed.weight": torch.randn(300, COLUMNS, generator=generator)}
    for layer in range(LAYERS):
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        tensors[f"layers.{layer}.weight"] = weight.to(torch.bfloat16)
        tensors[f"layers.{layer}.scale"] = torch.randn(COLUMNS, generator=generator)
    return tensors


def part_names(first: int, last: int) -> list[str]:
    return [f"layers.{i}.{kind}" for i in range(first, last) for kind in ("weight", "scale")]


TRUNK = part_names(4, 8)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of one file."""
    folder = tmp_path_factory.mktemp("single")
    save_file(tensors_of_model(), folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of four files, three layers in each."""
    folder = tmp_path_factory.mktemp("sharded")
    weight_map: dict[str, str] = {}
    tensors = tensors_of_model()
    for number in range(4):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        names = part_names(3 * number, 3 * number + 3) + (["embed.weight"] if number == 0 else [])
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub client's cache, one of this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return tmp_path / "theirs"


@pytest.fixture
def waits() -> list[float]:
    """Return the waits between attempts, none of which takes any time."""
    return []


@pytest.fixture
def open_model(tmp_path: Path, waits: list[float]) -> Callable[..., TensorSource]:
    """Return a function that opens the model of a hub, with a cache of this test's own."""

    def open_model(hub: LoopbackHub, **options: Any) -> TensorSource:
        patience = Patience(attempts=4, wait=lambda _, seconds: waits.append(seconds))
        files = HubFiles(
            REPO,
            tmp_path / "ours",
            options.pop("revision", None),
            token=options.pop("token", None),
            endpoint=hub.address,
            patience=patience,
        )
        return open_hub_source(files, FetchOptions(patience=patience, **{**EAGER, **options}))

    return open_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that forbids the network, as HF_HUB_OFFLINE does."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def load(source: TensorSource, names: Iterable[str] = TRUNK, **options: Any) -> None:
    """Bring a part here, and compare every tensor with the original."""
    names = list(names)
    source.prepare(names, **options)
    original = tensors_of_model()
    for name in names:
        assert torch.equal(source.read(name), original[name])
    source.close()


def nbytes(folder: Path, names: Iterable[str] = TRUNK) -> int:
    infos: dict[str, TensorInfo] = {}
    for path in folder.glob("*.safetensors"):
        infos |= read_header(path)
    return sum(infos[name].nbytes for name in names)


def header_bytes(folder: Path, files: Iterable[str]) -> int:
    paths = [folder / file for file in files]
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths)


def cached(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "ours" / "parts").glob(f"**/{pattern}"))


def of_weights(asked: Asked) -> bool:
    """Whether a request is for tensors, not for a header."""
    return asked.span is not None and asked.span[0] > 0


class TestWhatIsFetched:
    def test_the_parts_bytes_of_a_single_file(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))

        header = hub.gets()[0].span
        assert header is not None
        assert hub.weights_sent == nbytes(single) + header[1] - header[0]
        assert header[1] <= 8192

    def test_the_parts_bytes_of_the_shards_that_hold_them(
        self, sharded: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: sharded}).run() as hub:
            load(open_model(hub))

        files = {file for file in hub.fetched if file.endswith(".safetensors")}
        assert files == {f"model-{n:05}-of-00004.safetensors" for n in (2, 3)}
        assert hub.weights_sent <= 1.01 * nbytes(sharded) + 1.5 * header_bytes(sharded, files)

    def test_of_a_single_file_and_an_index_the_file_is_taken(
        self, single: Path, sharded: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        """So does transformers."""
        folder = tmp_path / "both"
        shutil.copytree(sharded, folder)
        shutil.copyfile(single / SINGLE, folder / SINGLE)
        with LoopbackHub({REPO: folder}).run() as hub:
            load(open_model(hub))
            load(open_model(hub))

        assert set(hub.fetched) == {SINGLE}

    def test_the_second_start_does_not_look_for_a_single_file_again(
        self, sharded: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: sharded}).run() as hub:
            load(open_model(hub))
            load(open_model(hub))

        assert len(hub.gets(SINGLE)) == 1

    def test_one_request_for_each_run_of_neighbours(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub, least_request=10**6, most_request=10**6))

        assert len([asked for asked in hub.gets() if of_weights(asked)]) == 2  # one for each dtype

    def test_a_header_longer_than_was_guessed_takes_a_second_request(
        self, tmp_path: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        folder = tmp_path / "many"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        tensors = {f"tensor.{'x' * 80}.{n}": torch.full((3,), n) for n in range(100)}
        save_file(tensors, folder / SINGLE)
        with LoopbackHub({REPO: folder}).run() as hub:
            source = open_model(hub)

        header = header_bytes(folder, [SINGLE])
        assert [asked.span for asked in hub.gets()] == [(0, 8192), (8192, header)]
        assert set(source.names()) == tensors.keys()

    def test_everything_is_of_the_commit_of_the_first_contact(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            source = open_model(hub)
            hub.commit = "f" * 40
            with pytest.raises(CheckpointError, match=f"commit {'f' * 40}, not {COMMIT}"):
                load(source)
            assert {asked.revision for asked in hub.asked[1:]} == {COMMIT}

    def test_a_commit_can_be_named(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub, revision=COMMIT))

        assert {asked.revision for asked in hub.asked} == {COMMIT}

    def test_a_whole_part_is_equal_to_the_local_one(
        self,
        make_checkpoint: Callable[..., Any],
        open_model: Callable[..., TensorSource],
    ) -> None:
        path = make_checkpoint("qwen2", dtype="bfloat16", shard_size="20KB").path
        config = load_config(path)
        spec = SplitPlan.from_split_points(config.num_hidden_layers, [2, 4]).component("trunk")
        calls: list[tuple[int, int]] = []

        def build(source: TensorSource, progress: Callable[[int, int], None] | None) -> Any:
            placement = Placement(torch.device("cpu"))
            return build_part(
                config, spec, source, placement, checkpoint="it", progress=progress
            ).model.state_dict()

        with LoopbackHub({REPO: path}).run() as hub:
            fetched = build(open_model(hub), lambda done, total: calls.append((done, total)))
        local = build(open_source(FolderFiles(path)), None)

        assert fetched.keys() == local.keys()
        assert all(torch.equal(fetched[name], local[name]) for name in local)
        assert calls == sorted(calls)
        assert {total for _, total in calls} == {calls[-1][0]}

    def test_the_stages_of_a_load_are_told(
        self, make_checkpoint: Callable[..., Any], open_model: Callable[..., TensorSource]
    ) -> None:
        class Stages(list[LoadStage]):
            def __call__(self, done: int, total: int) -> None: ...

            def enter_stage(self, stage: LoadStage) -> None:
                self.append(stage)

        path = make_checkpoint("qwen2").path
        config = load_config(path)
        spec = SplitPlan.from_split_points(config.num_hidden_layers, [2, 4]).component("trunk")

        def stages(source: TensorSource) -> list[LoadStage]:
            told = Stages()
            placement = Placement(torch.device("cpu"))
            build_part(config, spec, source, placement, checkpoint="it", progress=told)
            return list(told)

        with LoopbackHub({REPO: path}).run() as hub:
            assert stages(open_model(hub)) == [LoadStage.DOWNLOADING, LoadStage.READING]
            assert stages(open_source(FolderFiles(path))) == [LoadStage.READING]

    def test_no_file_is_ever_held_in_memory(
        self, tmp_path: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        folder = tmp_path / "large"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"large": torch.ones(4, 1_000_000)}, folder / SINGLE)
        with LoopbackHub({REPO: folder}).run() as hub:
            source = open_model(hub, workers=2, most_request=10**7, report_bytes=10**6)
            tracemalloc.start()
            source.prepare(["large"])
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()

        assert source.info("large").nbytes == 16_000_000
        assert peak < 4_000_000


class TestTheCache:
    def test_the_second_start_fetches_nothing(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))
            fetched = list(hub.fetched)
            load(open_model(hub))

        assert hub.fetched == fetched
        (path,) = cached(tmp_path, "*.safetensors")
        assert COMMIT in str(path)
        assert set(load_file(path)) == set(TRUNK)
        assert not cached(tmp_path, "*.partial") + cached(tmp_path, "*.journal")

    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_offline_what_was_fetched_is_enough(
        self,
        kind: str,
        request: pytest.FixtureRequest,
        open_model: Callable[..., TensorSource],
        offline: Callable[[], None],
    ) -> None:
        folder = request.getfixturevalue(kind)
        with LoopbackHub({REPO: folder}).run() as hub:
            load(open_model(hub))
        offline()

        load(open_model(hub))
        with pytest.raises(ModelSourceError, match=r"offline.*not in .*: 2 tensors of"):
            load(open_model(hub), part_names(5, 9))

    def test_a_hub_out_of_reach_is_said_and_the_cache_used(
        self,
        single: Path,
        open_model: Callable[..., TensorSource],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))

        load(open_model(hub))

        assert f"as it was when last seen, commit {COMMIT}" in caplog.text

    def test_offline_and_never_fetched(
        self, open_model: Callable[..., TensorSource], offline: Callable[[], None]
    ) -> None:
        offline()

        with pytest.raises(ModelSourceError, match=r"HF_HUB_OFFLINE.*not in"):
            open_model(LoopbackHub({}, address="http://127.0.0.1:9"))

    def test_the_hub_clients_cache_is_read_and_never_changed(
        self,
        sharded: Path,
        theirs: Path,
        open_model: Callable[..., TensorSource],
        tmp_path: Path,
    ) -> None:
        shard = "model-00002-of-00004.safetensors"
        with LoopbackHub({REPO: sharded}).run() as hub:
            hf_hub_download(REPO, shard, cache_dir=theirs, endpoint=hub.address)
            before = sorted(theirs.rglob("*"))
            hub.fetched.clear()
            load(open_model(hub))

        assert hub.fetched.count(shard) == 0
        assert "model-00003-of-00004.safetensors" in hub.fetched
        assert sorted(theirs.rglob("*")) == before
        (path,) = cached(tmp_path, "*.safetensors")
        assert set(load_file(path)) == set(part_names(6, 8))

    def test_offline_the_hub_clients_cache_is_enough(
        self,
        sharded: Path,
        theirs: Path,
        open_model: Callable[..., TensorSource],
        offline: Callable[[], None],
    ) -> None:
        with LoopbackHub({REPO: sharded}).run() as hub:
            for path in sharded.iterdir():
                hf_hub_download(REPO, path.name, cache_dir=theirs, endpoint=hub.address)
        offline()

        load(open_model(hub))

    def test_a_larger_part_serves_for_a_smaller_one(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))
            sent = hub.weights_sent
            load(open_model(hub), part_names(5, 7))

        assert hub.weights_sent == sent
        assert len(cached(tmp_path, "*.safetensors")) == 1

    def test_tensors_that_another_part_has_are_not_fetched_again(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))
            sent = hub.weights_sent
            calls: list[tuple[int, int]] = []
            load(open_model(hub), part_names(6, 10), progress=lambda *c: calls.append(c))

        assert hub.weights_sent - sent == nbytes(single, part_names(8, 10))
        assert calls[-1] == (nbytes(single, part_names(6, 10)),) * 2
        assert len(cached(tmp_path, "*.safetensors")) == 2

    @pytest.mark.parametrize("pattern", ["*.safetensors", "headers/*"])
    def test_a_damaged_cache_is_fetched_again(
        self,
        pattern: str,
        single: Path,
        open_model: Callable[..., TensorSource],
        tmp_path: Path,
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))
            for path in cached(tmp_path, pattern):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[:-100])
            sent = hub.weights_sent
            load(open_model(hub))
            assert hub.weights_sent > sent
            load(open_model(hub))

    def test_concurrent_loads_of_a_part_fetch_it_once(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        waiting = threading.Event()

        with LoopbackHub({REPO: single}, hold_after=30_000).run() as hub:
            sources = [open_model(hub), open_model(hub)]
            with ThreadPoolExecutor() as pool:
                first = pool.submit(load, sources[0])
                assert hub.held.wait(30)
                second = pool.submit(load, sources[1], progress=lambda *_: waiting.set())
                assert waiting.wait(30)
                hub.released.set()
                first.result()
                second.result()

        spans = [asked.span for asked in hub.gets() if of_weights(asked)]
        assert len(spans) == len(set(spans))
        assert sum(end - start for start, end in filter(None, spans)) == nbytes(single)

    def test_waiting_for_somebody_elses_fetch_can_be_given_up(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        class Cancelled(Exception):  # noqa: N818
            pass

        def cancel(_done: int, _total: int) -> None:
            raise Cancelled

        hub = LoopbackHub({REPO: single}, hold_after=30_000)
        with hub.run(), ThreadPoolExecutor() as pool:
            first = pool.submit(load, open_model(hub))
            assert hub.held.wait(30)
            with pytest.raises(Cancelled):
                load(open_model(hub), progress=cancel)
            hub.released.set()
            first.result()

    def test_a_cache_that_may_only_be_read_is_enough_once_it_is_filled(
        self,
        single: Path,
        open_model: Callable[..., TensorSource],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EROFS, "Read-only file system")

        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))
            before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ours").rglob("*")}
            monkeypatch.setattr(Path, "mkdir", refuse)
            monkeypatch.setattr(Path, "write_bytes", refuse)
            load(open_model(hub))
            with pytest.raises(StorageError, match=r"Read-only file system.*another cache_dir"):
                load(open_model(hub), part_names(5, 9))

        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "ours").rglob("*")}


class TestTheNetwork:
    def test_a_dropped_connection_is_taken_up_where_it_broke(
        self, single: Path, open_model: Callable[..., TensorSource], waits: list[float]
    ) -> None:
        with LoopbackHub({REPO: single}, fault=drop_first).run() as hub:
            load(open_model(hub, workers=2))

        header = hub.gets()[0].span
        assert header is not None
        assert hub.weights_sent == nbytes(single) + header[1]
        assert waits

    def test_a_hub_that_keeps_failing_is_given_up_and_the_next_start_goes_on(
        self, single: Path, open_model: Callable[..., TensorSource], waits: list[float]
    ) -> None:
        hub = LoopbackHub({REPO: single})
        hub.fault = lambda asked: Fault(status=500) if asked.number > 3 else None
        with hub.run():
            source = open_model(hub, workers=1)
            with pytest.raises(FetchError, match=r"model\.safetensors \(layers.*answer is 500"):
                load(source)
            assert len(waits) == 3
            sent = hub.weights_sent
            hub.fault = None
            load(open_model(hub))

        header = hub.gets()[0].span
        assert header is not None
        assert sent > header[1]
        assert hub.weights_sent == nbytes(single) + header[1]

    @pytest.mark.parametrize("status", [429, 503])
    def test_an_overloaded_hub_is_asked_again_when_it_wants_to_be(
        self,
        status: int,
        single: Path,
        open_model: Callable[..., TensorSource],
        waits: list[float],
    ) -> None:
        def overloaded(asked: Asked) -> Fault | None:
            busy = of_weights(asked) and asked.number == 1
            return Fault(status=status, headers={"Retry-After": "7"}) if busy else None

        with LoopbackHub({REPO: single}, fault=overloaded).run() as hub:
            load(open_model(hub))

        assert waits == [7.0]

    def test_the_hub_says_when_its_window_ends(
        self, single: Path, open_model: Callable[..., TensorSource], waits: list[float]
    ) -> None:
        def limited(asked: Asked) -> Fault | None:
            headers = {"RateLimit": '"resolvers";r=0;t=41'}
            return Fault(status=429, headers=headers) if asked.span and asked.number == 0 else None

        with LoopbackHub({REPO: single}, fault=limited).run() as hub:
            load(open_model(hub))

        assert waits == [41.0]

    def test_waits_grow_are_spread_and_are_bounded(self) -> None:
        patience = Patience(first=1.0, longest=10.0)

        delays = [patience.delay(failures, None) for failures in range(1, 9)]

        assert all(
            0.5 * bound <= delay <= bound
            for delay, bound in zip(delays, [1, 2, 4, 8, 10, 10, 10, 10], strict=True)
        )
        assert patience.delay(1, 3600.0) == 10.0
        assert patience.delay(1, 3.0) == 3.0

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_refusal_is_not_asked_again(
        self,
        status: int,
        single: Path,
        open_model: Callable[..., TensorSource],
        waits: list[float],
    ) -> None:
        hub = LoopbackHub({REPO: single})
        hub.fault = lambda asked: Fault(status=status) if of_weights(asked) else None
        with hub.run(), pytest.raises(ModelSourceError, match=f"refuses \\({status}.*HF_TOKEN"):
            load(open_model(hub, workers=1))

        assert not waits

    def test_a_gated_model_asks_for_a_token(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with LoopbackHub({REPO: single}, token="secret").run() as hub:  # noqa: S106
            with pytest.raises(ModelSourceError, match=r"gated.*HF_TOKEN"):
                open_model(hub)
            load(open_model(hub, token="secret"))  # noqa: S106

    def test_large_files_lie_on_another_host_which_never_sees_the_token(
        self,
        single: Path,
        open_model: Callable[..., TensorSource],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "secret")
        storage = LoopbackHub({REPO: single})
        hub = LoopbackHub({REPO: single}, token="secret", storage=storage)  # noqa: S106
        with storage.run(), hub.run():
            load(open_model(hub, workers=1))

        assert {asked.authorization for asked in hub.asked} == {"Bearer secret"}
        assert {asked.authorization for asked in storage.asked} == {None}
        assert len(storage.asked) > 3
        assert len(hub.gets()) == 2, "where a redirect leads is remembered: header, then tensors"

    @pytest.mark.parametrize("uses", [1, 2])
    def test_signed_addresses_expire(
        self, uses: int, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        storage = LoopbackHub({REPO: single}, signed_uses=uses)
        hub = LoopbackHub({REPO: single}, storage=storage)
        with storage.run(), hub.run():
            load(open_model(hub, workers=1))

        refused = len(storage.asked) - len(storage.fetched)
        assert refused == 1, "an address is asked for anew when it has expired, not before"


class TestWrongAnswers:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (Fault(headers={"Content-Range": "bytes 5-24/100"}), "the answer says bytes 5-24/100"),
            (Fault(headers={"Content-Range": "nonsense"}), "the answer says nonsense"),
            (Fault(cut=100), r"and \d+ bytes"),
            (Fault(headers={"Content-Encoding": "gzip"}), "encoded"),
            (Fault(headers={"ETag": '"other"'}), "changed while it was fetched.*'other'"),
            (Fault(headers={"X-Repo-Commit": "f" * 40}), f"of commit {'f' * 40}"),
            (Fault(status=416), "ends before those bytes"),
            (Fault(status=404), "no longer has the file"),
        ],
    )
    def test_are_named_with_file_and_tensor_and_leave_nothing(
        self,
        fault: Fault,
        message: str,
        single: Path,
        open_model: Callable[..., TensorSource],
        tmp_path: Path,
        waits: list[float],
    ) -> None:
        hub = LoopbackHub({REPO: single})
        hub.fault = lambda asked: fault if of_weights(asked) and asked.number == 3 else None
        with hub.run():
            with pytest.raises(CheckpointError, match=message) as caught:
                load(open_model(hub))
            assert "someone/model/model.safetensors (layers." in str(caught.value)
            assert not cached(tmp_path, "*.partial") + cached(tmp_path, "*.journal")
            assert not cached(tmp_path, "*.safetensors")
            hub.fault = None
            load(open_model(hub))

        assert not waits, "an answer that is wrong is not asked for again"

    def test_the_hub_goes_on_with_another_content_under_the_same_commit(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        folder = tmp_path / "changing"
        shutil.copytree(single, folder)
        with LoopbackHub({REPO: folder}).run() as hub:
            source = open_model(hub)
            save_file({"other": torch.ones(100_000)}, folder / SINGLE)
            with pytest.raises(CheckpointError, match=r"the file has 400.* bytes, it had"):
                load(source)
            assert set(open_model(hub).names()) == {"other"}

    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_a_server_that_ignores_ranges_sends_whole_files_and_that_is_said(
        self,
        kind: str,
        request: pytest.FixtureRequest,
        open_model: Callable[..., TensorSource],
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
    ) -> None:
        folder = request.getfixturevalue(kind)
        calls: list[tuple[int, int]] = []
        with LoopbackHub({REPO: folder}, ranges=False).run() as hub:
            load(open_model(hub), progress=lambda *call: calls.append(call))
            fetched = list(hub.fetched)
            load(open_model(hub))
            assert hub.fetched == fetched

        assert "the server ignores Range requests" in caplog.text
        assert not cached(tmp_path, "*.safetensors")

    def test_a_server_that_stops_honouring_ranges(
        self,
        single: Path,
        open_model: Callable[..., TensorSource],
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
    ) -> None:
        calls: list[tuple[int, int]] = []
        with LoopbackHub({REPO: single}).run() as hub:
            source = open_model(hub, workers=1)
            hub.ranges = False
            load(source, progress=lambda *call: calls.append(call))

        assert "the server ignores Range requests" in caplog.text
        assert calls[-1][0] == calls[-1][1]
        assert not cached(tmp_path, "*.partial")

    def test_bin_files_come_whole_and_that_is_said(
        self,
        tmp_path: Path,
        open_model: Callable[..., TensorSource],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        torch.save(tensors_of_model(), folder / "pytorch_model.bin")
        with LoopbackHub({REPO: folder}).run() as hub:
            load(open_model(hub))

        assert "no safetensors" in caplog.text

    def test_a_model_that_the_hub_does_not_have(
        self, open_model: Callable[..., TensorSource]
    ) -> None:
        with (
            LoopbackHub({}).run() as hub,
            pytest.raises(ModelSourceError, match=r"'someone/model'.* has no such model"),
        ):
            open_model(hub)

    def test_a_revision_that_the_model_does_not_have(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with (
            LoopbackHub({REPO: single}).run() as hub,
            pytest.raises(ModelSourceError, match="has no revision 'new'"),
        ):
            open_model(hub, revision="new")

    def test_a_revision_is_no_path(self, open_model: Callable[..., TensorSource]) -> None:
        with (
            LoopbackHub({}).run() as hub,
            pytest.raises(ModelSourceError, match="no branch, tag or commit"),
        ):
            open_model(hub, revision="../../etc")

    def test_a_hub_that_is_not_there(
        self, open_model: Callable[..., TensorSource], waits: list[float]
    ) -> None:
        nobody = LoopbackHub({}, address="http://127.0.0.1:9")
        with pytest.raises(ModelSourceError, match=r"'someone/model'.* can't be reached") as caught:
            open_model(nobody)

        assert len(waits) == 2
        assert isinstance(caught.value, ConnectionError)  # so that a manager tries again later

    @pytest.mark.parametrize(("status", "heals"), [(403, False), (500, True)])
    def test_a_whole_file_that_the_hub_does_not_give(
        self, status: int, heals: bool, single: Path, tmp_path: Path
    ) -> None:
        hub = LoopbackHub({REPO: single})
        hub.fault = lambda asked: (
            Fault(status=status) if asked.method == "GET" and asked.file == "config.json" else None
        )
        with hub.run():
            files = HubFiles(REPO, tmp_path / "ours", endpoint=hub.address)
            with pytest.raises(OSError, match=r"config\.json can't be fetched") as caught:
                files.find("config.json")

        assert isinstance(caught.value, ConnectionError) is heals

    def test_a_server_that_is_no_hub(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        with (
            LoopbackHub({REPO: single}, commit="").run() as hub,
            pytest.raises(ModelSourceError, match="no hub that answers; look at HF_ENDPOINT"),
        ):
            open_model(hub)

    def test_no_weights_at_all(
        self, tmp_path: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        with (
            LoopbackHub({REPO: tmp_path}).run() as hub,
            pytest.raises(ModelSourceError, match=r"neither model\.safetensors"),
        ):
            open_model(hub)

    def test_the_index_names_a_file_that_is_not_there(
        self, tmp_path: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
        with LoopbackHub({REPO: tmp_path}).run() as hub:
            source = open_model(hub)
            with pytest.raises(
                CheckpointError, match=r"names x\.safetensors, with a: the hub has no"
            ):
                source.info("a")

    @pytest.mark.parametrize("length", [0, 5, 100, 3_000, -1])
    def test_a_file_that_is_cut_off(
        self, length: int, single: Path, tmp_path: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / SINGLE).write_bytes((single / SINGLE).read_bytes()[:length])
        with (
            LoopbackHub({REPO: tmp_path}).run() as hub,
            pytest.raises(CheckpointError, match=r"someone/model/model\.safetensors"),
        ):
            open_model(hub)
        assert not cached(tmp_path, "*")


class TestEndings:
    def test_progress_can_end_the_fetch_and_the_next_start_goes_on(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        class Cancelled(Exception):  # noqa: N818 - as a caller may have it
            pass

        def cancel(done: int, total: int) -> None:
            assert total == nbytes(single)
            if done > 20_000:
                raise Cancelled

        with LoopbackHub({REPO: single}, hold_after=40_000).run() as hub:
            with pytest.raises(Cancelled):
                load(open_model(hub, workers=1), progress=cancel)
            assert not fetching_threads()
            recorded = nbytes_recorded(tmp_path)
            hub.hold_after = None
            hub.released.set()
            hub.asked.clear()
            load(open_model(hub))

        spans = [asked.span for asked in hub.gets() if asked.span is not None]
        assert recorded > 20_000
        assert sum(end - start for start, end in spans) == nbytes(single) - recorded

    def test_a_fetch_that_stalls_can_be_ended(
        self, single: Path, open_model: Callable[..., TensorSource]
    ) -> None:
        class Cancelled(Exception):  # noqa: N818
            pass

        with LoopbackHub({REPO: single}, hold_after=60_000).run() as hub:

            def cancel(_done: int, _total: int) -> None:
                if hub.held.is_set():
                    raise Cancelled

            with pytest.raises(Cancelled):
                load(open_model(hub), progress=cancel)
            assert not hub.released.is_set(), "the server still holds the answers back"

        assert not fetching_threads()

    def test_a_killed_process_has_its_part_taken_up(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        with LoopbackHub({REPO: single}, hold_after=50_000).run() as hub:
            with start_fetch(hub, tmp_path) as process:
                assert process.stdout is not None
                assert any(int(line) > 0 for line in process.stdout), process.stderr
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            assert not cached(tmp_path, "*.safetensors")
            recorded = nbytes_recorded(tmp_path)
            hub.released.set()
            before = len(hub.gets())
            load(open_model(hub))

        assert recorded > 0
        # What was asked for, not what was sent: the hub may yet write to who was killed.
        spans = [asked.span for asked in hub.gets()[before:]]
        assert sum(stop - start for start, stop in spans) == nbytes(single) - recorded
        assert not cached(tmp_path, "*.partial")

    def test_a_process_that_is_killed_at_its_last_step_leaves_nothing(
        self, single: Path, open_model: Callable[..., TensorSource], tmp_path: Path
    ) -> None:
        with LoopbackHub({REPO: single}).run() as hub:
            load(open_model(hub))
            (path,) = cached(tmp_path, "*.safetensors")
            path.with_suffix(".journal").touch()
            load(open_model(hub))

        assert not cached(tmp_path, "*.journal")

    @pytest.mark.parametrize(
        "damage", [lambda _: b"", lambda data: data[:-3], lambda _: b"{}\n1 9"]
    )
    def test_a_journal_that_means_nothing_is_not_believed(
        self,
        damage: Callable[[bytes], bytes],
        single: Path,
        open_model: Callable[..., TensorSource],
        tmp_path: Path,
    ) -> None:
        hub = LoopbackHub({REPO: single})
        hub.fault = lambda asked: Fault(status=500) if asked.number > 3 else None
        with hub.run():
            with pytest.raises(FetchError):
                load(open_model(hub, workers=1))
            (journal,) = cached(tmp_path, "*.journal")
            journal.write_bytes(damage(journal.read_bytes()))
            hub.fault = None
            load(open_model(hub))

    def test_a_full_disk_leaves_nothing(self, single: Path, tmp_path: Path) -> None:
        with (
            LoopbackHub({REPO: single}).run() as hub,
            start_fetch(hub, tmp_path, max_file_bytes=40_000) as process,
        ):
            _, errors = process.communicate()

        assert process.returncode == 1
        assert "StorageError" in errors
        assert "make room there, or name another cache_dir" in errors
        assert not cached(tmp_path, "*.partial") + cached(tmp_path, "*.safetensors")

    def test_a_disk_without_room_is_seen_before_anything_is_fetched(
        self,
        single: Path,
        open_model: Callable[..., TensorSource],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        usage = shutil.disk_usage(single)._replace(free=1000)
        with LoopbackHub({REPO: single}).run() as hub:
            source = open_model(hub)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
            with pytest.raises(StorageError, match="1000 bytes free, the part needs 68"):
                load(source)

        assert not [asked for asked in hub.gets() if of_weights(asked)]


FETCH = """
import resource, sys
from pathlib import Path
from splitlearn_core.loading.fetch import FetchOptions
from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_parts import HubParts
from splitlearn_core.loading.ranges import Located

address, cache, limit, *names = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
options = FetchOptions(
    workers=2, least_request=24_000, most_request=24_000, record_bytes=1, report_bytes=1
)
parts = HubParts(HubFiles("someone/model", Path(cache), endpoint=address), options)
header = parts.header("model.safetensors")
tensors = {name: Located("model.safetensors", header[name]) for name in names}
parts.obtain(tensors, lambda done, total: print(done, flush=True))
"""


def start_fetch(hub: LoopbackHub, tmp_path: Path, max_file_bytes: int = 0) -> subprocess.Popen[str]:
    """Fetch a part in a process of its own, which prints its progress."""
    command = [sys.executable, "-c", FETCH, hub.address, str(tmp_path / "ours")]
    return subprocess.Popen(
        [*command, str(max_file_bytes), *TRUNK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )


def drop_first(asked: Asked) -> Fault | None:
    """Drop the connection in the middle of the first two answers."""
    return Fault(drop_after=10_000) if of_weights(asked) and asked.number in {1, 2} else None


def fetching_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("splitlearn-fetch")]


def journals(tmp_path: Path) -> list[str]:
    """Return the lines of the journal, its heading left out."""
    return [
        line for path in cached(tmp_path, "*.journal") for line in path.read_text().splitlines()
    ][1:]


def nbytes_recorded(tmp_path: Path) -> int:
    spans = [tuple(map(int, line.split())) for line in journals(tmp_path)]
    return sum(end - start for start, end in spans)
