"""A model on the hub: pinned to one commit, its small files here, its weights where they are.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and the rest hold, as with any program that uses
`huggingface_hub`.  What is fetched goes to this library's own cache; what the hub client's cache
holds is read, and never changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, httpx  # type: ignore[attr-defined]
from tqdm import tqdm

from splitlearn_core import __version__
from splitlearn_core.errors import (
    CheckpointError,
    FetchError,
    HubUnreachableError,
    ModelSourceError,
    StorageError,
)
from splitlearn_core.loading.part_cache import PartCache, write_atomically
from splitlearn_core.loading.remote import Identity, RemoteFile
from splitlearn_core.loading.retries import Patience, TransientError, patiently
from splitlearn_core.messages import in_one_line
from splitlearn_core.shape import CONFIG_FILE

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Whoever has no network should hear of it soon.
_FIRST_CONTACT_ATTEMPTS = 3
_NOT_FOUND = 404
# Answers that asking again does not change; 429 and the 5xx may pass.
_LASTING = {400, 401, 403, _NOT_FOUND, 410}


class HubFiles:
    """The files of a model on the hub, at the commit that its revision had at first contact."""

    def __init__(
        self,
        repo_id: str,
        cache_dir: Path,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        endpoint: str | None = None,
        patience: Patience | None = None,
        progress_bar: bool = False,
    ) -> None:
        """Name a model; nothing is asked of the hub yet.

        Args:
            repo_id: `owner/model`.
            cache_dir: Where fetched files are kept.
            revision: Branch, tag or commit; `main` when left out.
            token: As `huggingface_hub` takes it: `None` uses `HF_TOKEN` or the login.
            endpoint: The hub's address; `HF_ENDPOINT` when left out.
            patience: When to ask again.
            progress_bar: Show bars while something is fetched.
        """
        self.repo_id = repo_id
        self.weights_file: str | None = None
        self.progress_bar = progress_bar
        self.patience = patience or Patience()
        self._cache_dir = cache_dir / "hub"
        self._parts_dir = cache_dir / "parts"
        self._revision = revision or constants.DEFAULT_REVISION
        self._token = token
        self._endpoint = endpoint
        self._unreachable = False

    @property
    def description(self) -> str:
        """The model's name, for messages."""
        offline = " (offline: only what is in the cache)" if self.is_offline else ""
        return f"{self.repo_id} on the hub{offline}"

    @property
    def is_offline(self) -> bool:
        """Whether only what is on this machine can be used."""
        return self._unreachable or constants.is_offline_mode()

    @cached_property
    def commit(self) -> str:
        """The commit that everything is taken from.

        Raises:
            ModelSourceError: The hub has no such model, or can't be asked, and the cache has none.
            HubUnreachableError: (also a `FetchError`) It may be asked, and did not answer.
        """
        if _COMMIT.fullmatch(self._revision):
            return self._revision
        commit = self._remembered_commit() if self.is_offline else self._current_commit()
        if commit is None:
            raise ModelSourceError(self._absent("the hub may not be asked (HF_HUB_OFFLINE)"))
        logger.info("%s at %s is commit %s", self.repo_id, self._revision, commit)
        return commit

    @cached_property
    def parts(self) -> PartCache:
        """The fetched parts of this model at this commit."""
        folder = repo_folder_name(repo_id=self.repo_id, repo_type="model")
        return PartCache(self._parts_dir / folder / self.commit)

    @property
    def parts_folder(self) -> Path:
        """Where fetched parts are kept, those of all models."""
        return self._parts_dir

    @property
    def whole_folders(self) -> list[Path]:
        """The folders that hold this commit's whole files: in our cache, in the hub client's."""
        folder = repo_folder_name(repo_id=self.repo_id, repo_type="model")
        return [cache / folder / "snapshots" / self.commit for cache in self._caches]

    def find(self, name: str) -> Path | None:
        """Return a file's path, fetched whole if need be; `None` where there is no such file.

        Online the path is in our own cache, so that files which belong together lie together.
        """
        ours, theirs = self._kept(name)
        if isinstance(ours, str):
            return Path(ours)
        if self.is_offline:
            return Path(theirs) if isinstance(theirs, str) else None
        return None if ours is not None else self._download(name)

    def fetch(self, name: str, report: Callable[[int], None] | None = None) -> Path:
        """Return a file's path, from wherever it is; an error where there is no such file.

        Args:
            name: The file.
            report: Called with the number of bytes each time that some have come in; what it
                raises ends the fetch.
        """
        path = self.local(name)
        if path is None and not self.is_offline:
            path = self._download(name, report)
        if path is None:
            raise CheckpointError(f"{self.describe(name)}: {self.missing}")
        return path

    def local(self, name: str) -> Path | None:
        """Return the path of a whole file that is here: in our cache, or in the hub client's."""
        return next((Path(path) for path in self._kept(name) if isinstance(path, str)), None)

    @property
    def missing(self) -> str:
        """Say of a file that it is not there, as far as that can be known."""
        if self.is_offline:
            return "not in the cache, and the hub can't be asked"
        return "the hub has no such file"

    def describe(self, name: str) -> str:
        """Return model and file name."""
        return f"{self.repo_id}/{name}"

    def remote(self, name: str, identity: Identity | None = None) -> RemoteFile:
        """Return a file that is read in ranges, `identity` being what is known of its content."""
        url = hf_hub_url(self.repo_id, name, revision=self.commit, endpoint=self._endpoint)
        headers = build_hf_headers(
            token=self._token, library_name="splitlearn", library_version=__version__
        )
        return RemoteFile(url, headers, self.describe(name), self.commit, identity)

    def _current_commit(self) -> str | None:
        """Ask the hub which commit the revision is; where it can't be reached, the last known."""
        known = self._remembered_commit()
        attempts = 1 if known else _FIRST_CONTACT_ATTEMPTS
        patience = replace(self.patience, attempts=min(attempts, self.patience.attempts))
        try:
            commit = patiently(self._ask_commit, self.repo_id, patience)
        except FetchError as error:
            if known is None:
                raise HubUnreachableError(
                    self._absent(f"the hub can't be reached ({error.__cause__})")
                ) from error
            logger.warning(
                "the hub can't be reached (%s): taking %s as it was when last seen, commit %s",
                error.__cause__, self.repo_id, known,
            )  # fmt: skip
            self._unreachable = True
            return known
        if commit != known:
            write_atomically(self._reference(self._cache_dir), commit.encode())
        return commit

    def _ask_commit(self) -> str:
        """Ask the hub which commit the revision is now."""
        url = hf_hub_url(
            self.repo_id, CONFIG_FILE, revision=self._revision, endpoint=self._endpoint
        )
        try:
            commit = get_hf_file_metadata(
                url, token=self._token, endpoint=self._endpoint
            ).commit_hash
        except RemoteEntryNotFoundError as error:
            commit = error.response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        except (HfHubHTTPError, HFValidationError, httpx.HTTPError) as error:
            raise self._explained(error) from error
        if commit is None or not _COMMIT.fullmatch(commit):
            raise ModelSourceError(
                f"{self.repo_id}: the answer names no commit, so it is no hub that answers; look at"
                " HF_ENDPOINT, and at proxies on the way"
            )
        return commit

    def _explained(self, error: Exception) -> Exception:
        """Say what an error of the hub's client means."""
        if isinstance(error, RevisionNotFoundError):
            return ModelSourceError(f"{self.repo_id} has no revision {self._revision!r} on the hub")
        if isinstance(error, GatedRepoError):
            return ModelSourceError(
                f"{self.repo_id} is gated: ask for access on its page, and set HF_TOKEN"
            )
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            return ModelSourceError(self._absent("the hub has no such model (or hides it)"))
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _LASTING:
            return ModelSourceError(f"{self.repo_id}: the hub refuses: {in_one_line(error)}")
        return TransientError(in_one_line(error))

    @property
    def _caches(self) -> tuple[Path, Path]:
        return self._cache_dir, Path(constants.HF_HUB_CACHE)

    def _kept(self, name: str) -> list[Any]:
        """Return, for each cache, a path, or that there is no such file, or `None`: not known."""
        return [
            try_to_load_from_cache(self.repo_id, name, cache_dir=cache, revision=self.commit)
            for cache in self._caches
        ]

    def _download(self, name: str, report: Callable[[int], None] | None = None) -> Path | None:
        """Fetch a whole file into our cache; the hub's client resumes and checks."""
        try:
            return Path(
                hf_hub_download(
                    self.repo_id,
                    name,
                    cache_dir=self._cache_dir,
                    revision=self.commit,
                    token=self._token,
                    endpoint=self._endpoint,
                    tqdm_class=_bar(report, show=self.progress_bar),
                )
            )
        except LocalEntryNotFoundError as error:
            raise FetchError(f"{self.describe(name)} can't be fetched: {error}") from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            if error.response.status_code == _NOT_FOUND:
                return None
            lasting = error.response.status_code in _LASTING
            kind = ModelSourceError if lasting else FetchError
            raise kind(f"{self.describe(name)} can't be fetched: {error}") from error
        except httpx.HTTPError as error:
            raise FetchError(f"{self.describe(name)} can't be fetched: {error}") from error
        except OSError as error:
            self._discard_unfinished()
            raise StorageError(
                f"{self.describe(name)} can't be written to {self._cache_dir}:"
                f" {error.strerror or error}; make room there, or name another cache_dir",
                error.errno,
            ) from error

    def _discard_unfinished(self) -> None:
        """Give back the room that a whole file took which did not fit."""
        folder = self._cache_dir / repo_folder_name(repo_id=self.repo_id, repo_type="model")
        for path in folder.glob("blobs/*.incomplete"):
            path.unlink(missing_ok=True)

    def _remembered_commit(self) -> str | None:
        """Return the commit that the revision was, when the hub was last asked."""
        for cache in self._caches:
            path = self._reference(cache)
            commit = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
            if _COMMIT.fullmatch(commit):
                return commit
        return None

    def _reference(self, cache: Path) -> Path:
        """Return the file that remembers the revision's commit, as the hub's client lays it out."""
        references = cache / repo_folder_name(repo_id=self.repo_id, repo_type="model") / "refs"
        path = references / self._revision
        if not path.resolve().is_relative_to(references.resolve()):
            raise ModelSourceError(f"{self._revision!r} is no branch, tag or commit")
        return path

    def _absent(self, reason: str) -> str:
        return (
            f"no model {self.repo_id!r}: no folder of that name is here, {reason}, and it is not in"
            f" {self._cache_dir}"
        )


def _bar(report: Callable[[int], None] | None, *, show: bool) -> type[tqdm[Any]]:
    """Return what the hub's client tells of its progress."""

    class Bar(tqdm):  # type: ignore[type-arg]  # not subscriptable at run time
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": not show})

        def update(self, n: float | None = 1) -> bool | None:
            if report is not None and n:
                report(int(n))
            return super().update(n)

    return Bar
