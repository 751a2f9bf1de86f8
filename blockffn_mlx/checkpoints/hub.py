"""Downloads checkpoints from the Hugging Face Hub, with one clear sentence when that fails."""

import fnmatch
import hashlib
import io
import os
import re
import shutil
import ssl
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    tqdm,
)

from .reader import KINDS, NO_WEIGHTS

# Called with what is being done ("download", "convert"), the bytes done and the bytes in all.
Progress = Callable[[str, int, int], None]

# Configs, tokenizer files and a draft's frequency lists; never code.
TEXTS = ["*.json", "*.jinja", "tokenizer.model", "freq_*"]
# The weights of a folder are the first of these that it has.
WEIGHTS = ["pytorch_model*.bin", "model*.safetensors", *(f"*{kind}" for kind in KINDS)]
# Folders of a repository that are read: the model's own and that of its draft head.
FOLDERS = (".", "draft")
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
COMMIT = "[0-9a-f]{7,64}"
FREE_SPACE_MARGIN = 256 << 20  # what stays free on the disk after a download, in bytes


def is_local(path_or_repo: str | Path) -> bool:
    """Whether a name means something on this disk rather than on the Hub."""
    text = os.fspath(path_or_repo)
    return os.path.exists(text) or text.startswith((".", "/", "~")) or text.count("/") != 1


def commit_of(repo: str, revision: str | None = None) -> str:
    """The commit that a revision of a repository stands for, as far as the network can tell.

    Raises:
        ValueError: If the id or revision is unknown or not accessible.
        OSError: If the Hub cannot be asked and the repository was never downloaded.
    """
    try:
        return _ask(repo, revision)[0]
    except Exception as error:  # the HTTP library's errors are neither ValueError nor OSError
        return _kept_instead(repo, revision, error).name


def download(
    repo: str,
    revision: str | None = None,
    on_progress: Progress | None = None,
    patterns: list[str] | None = None,
) -> Path:
    """Brings a repository's model files into the Hub's own cache.

    Args:
        repo: A Hub id, "owner/name".
        revision: Branch, tag or commit; the main branch if None.
        on_progress: Told of the bytes that have arrived.
        patterns: Names of the files that are wanted; all that are read of a model if None.

    Returns:
        The folder of the snapshot, whose name is the commit.

    Raises:
        ValueError: If the id or revision is unknown or not accessible.
        OSError: If the Hub cannot be asked, the disk is too full, or a file arrives damaged.
    """
    try:
        commit, sizes = _ask(repo, revision)
    except Exception as error:
        return _kept_instead(repo, revision, error)
    folder = snapshot_folder(repo, commit)
    wanted = _files_of_model(sizes) if patterns is None else _any_of(sizes, patterns)
    if not wanted:
        raise ValueError(f"{repo} holds no model files: check its name and revision.")
    missing = [name for name in wanted if not (folder / name).exists()]
    _check_free_space(repo, sum(sizes[name] for name in missing))
    try:
        snapshot_download(
            repo,
            revision=commit,
            endpoint=ENDPOINT,
            cache_dir=HF_HUB_CACHE,
            allow_patterns=[escape(name) for name in wanted],
            tqdm_class=_progress_bar(on_progress),
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the disk's own error, such as a full one
            raise
        raise _explained(error, repo, revision) from error
    total, done = sum((folder / name).stat().st_size for name in missing), 0
    for name in missing:
        for size in _check_hash(repo, folder / name):
            done += size
            if on_progress:
                on_progress("check", done, total)
    remember(repo, revision, commit)
    return folder


def download_config(repo: str, revision: str | None = None) -> Path:
    """Brings a repository's config.json alone into the Hub's own cache.

    Raises:
        ValueError: If the id or revision is unknown or not accessible.
        OSError: If the Hub cannot be asked.
    """
    return download(repo, revision, patterns=["config.json"]) / "config.json"


def snapshot_folder(repo: str, commit: str) -> Path:
    """Where the Hub's cache keeps a commit of a repository, whether or not it is there."""
    return _repo_folder(repo) / "snapshots" / commit


def upload(folder: Path, repo: str, files: list[str]):
    """Uploads a converted folder to a repository of the user's, which is created if need be.

    Args:
        folder: The folder.
        repo: A Hub id, "owner/name".
        files: What is uploaded; whatever else lies in the folder is the user's own.

    Raises:
        OSError: If the Hub does not take it; the folder stays where it is.
    """
    try:
        with _no_bars():
            api = HfApi(endpoint=ENDPOINT)
            api.create_repo(repo, exist_ok=True)
            patterns = [escape(name) for name in files]
            api.upload_folder(folder_path=folder, repo_id=repo, allow_patterns=patterns)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{folder} is written, but {repo} could not be uploaded: {reason}") from error


def _ask(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and the sizes of its files in bytes, by name."""
    info = HfApi(endpoint=ENDPOINT).model_info(repo, revision=revision, files_metadata=True)
    if not re.fullmatch(COMMIT, str(info.sha)):
        raise ValueError("the answer names no commit")
    return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _any_of(names: Iterable[str], patterns: list[str]) -> list[str]:
    return [
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _files_of_model(names: Iterable[str]) -> list[str]:
    """What is read of a repository: text files, and one set of weights in each of its folders.

    Weights are told by what they are: trainers leave more .bin and .pt files beside them. The .bin
    files are the published ones; a repository with both needs no second copy.
    """
    wanted = []
    for folder in FOLDERS:
        here = (name for name in names if _parent(name) == folder and "\\" not in name)
        inside = {PurePosixPath(name).name: name for name in here}
        weights = [name for name in inside if not NO_WEIGHTS.match(name)]
        sets = (fnmatch.filter(weights, pattern) for pattern in WEIGHTS)
        chosen = _any_of(inside, TEXTS) + next((found for found in sets if found), [])
        wanted += [inside[name] for name in chosen]
    return wanted


def _parent(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _repo_folder(repo: str) -> Path:
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _ref(repo: str, revision: str | None) -> Path | None:
    """The file in which the Hub's cache keeps the commit of a branch or tag."""
    refs = _repo_folder(repo) / "refs"
    ref = refs / (revision or "main")
    return ref if ref.resolve().is_relative_to(refs.resolve()) else None


def remember(repo: str, revision: str | None, commit: str):
    """Notes which commit a revision stood for, so that it is found again without a network.

    The Hub's client does so for branches and tags that it resolves itself.
    """
    ref = _ref(repo, revision)
    if ref is None or revision == commit:
        return
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=ref.parent, delete=False) as file:
            file.write(commit)
        os.replace(file.name, ref)
    except OSError:
        pass  # a cache that cannot be written serves as it is


def kept_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot of a revision as it was downloaded before, or None."""
    try:
        ref = _ref(repo, revision)
        commit = ref.read_text().strip() if ref and ref.is_file() else revision or ""
        folder = snapshot_folder(repo, commit)
        return folder if re.fullmatch(COMMIT, commit) and folder.is_dir() else None
    except (OSError, ValueError):  # not even a name that a file could have
        return None


def _kept_instead(repo: str, revision: str | None, error: Exception) -> Path:
    """What was downloaded before, where the Hub gave no answer; else raises what is wrong."""
    trouble = _explained(error, repo, revision)
    kept = kept_snapshot(repo, revision)
    if kept is None or isinstance(trouble, ValueError):
        raise trouble from error
    if not HF_HUB_OFFLINE:
        warnings.warn(f"{trouble} What was downloaded before is used.", stacklevel=5)
    return kept


def _explained(error: Exception, repo: str, revision: str | None) -> ValueError | OSError:
    """One sentence that names the trouble: a ValueError where the Hub answered for good."""
    chain = list(_chain(error))
    kinds = {type(cause).__name__ for cause in chain}
    text = " ".join(str(cause) for cause in chain)
    codes = (getattr(getattr(cause, "response", None), "status_code", None) for cause in chain)
    status = next((code for code in codes if isinstance(code, int)), 0)

    def is_any(*types: type) -> bool:
        return any(isinstance(cause, types) for cause in chain)

    if is_any(HFValidationError):
        return ValueError(f"{repo} is neither a folder here nor a Hub id (owner/name).")
    if is_any(GatedRepoError):
        return ValueError(f"{repo} is gated: accept its terms on the Hub and log in.")
    if is_any(RevisionNotFoundError):
        return ValueError(f"{repo} has no revision {revision} on the Hub.")
    if status == 401 and "Invalid credentials" in text:
        return ValueError(
            "the Hub does not accept your token (401): log in anew with hf auth login, or unset "
            "HF_TOKEN."
        )
    if is_any(RepositoryNotFoundError) or status == 401:
        return ValueError(f"the Hub has no {repo}: check its name, or log in if it is private.")
    if status == 403:
        return ValueError(f"the Hub forbids access to {repo} (403): use a token that may read it.")
    if status == 404:
        return ValueError(f"the Hub lacks what was asked of {repo} (404): check the revision.")
    if status == 429:
        return OSError("the Hub limits how often it is asked (429): wait some minutes, or log in.")
    if status == 407 or "ProxyError" in kinds:
        return OSError("the proxy refused the way to the Hub: check HTTPS_PROXY and HTTP_PROXY.")
    if status >= 500:
        return OSError(f"the Hub has trouble of its own ({status}): try again later.")
    if is_any(ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in text or "[SSL" in text:
        return OSError(
            "the Hub's certificate cannot be verified (TLS): check the clock, and name a proxy's "
            "own certificate in SSL_CERT_FILE."
        )
    if is_any(OfflineModeIsEnabled) or HF_HUB_OFFLINE:
        return OSError(f"HF_HUB_OFFLINE is set, and {repo} was not downloaded before.")
    if status >= 400:
        return OSError(f"the Hub answered {status} when asked for {repo}: try again later.")
    if any(name in os.environ for name in PROXIES):
        return OSError(
            f"the Hub cannot be reached for {repo}: check the network, and the proxy that "
            "HTTPS_PROXY names."
        )
    if isinstance(error, ValueError):
        return OSError(f"{ENDPOINT} does not answer as the Hub does: check HF_ENDPOINT.")
    return OSError(f"the Hub cannot be reached for {repo}: check the network.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _check_hash(repo: str, file: Path) -> Iterator[int]:
    """Refuses a file that is not what the Hub announced; the cache names each by that hash.

    Yields:
        The bytes that were read, some at a time.
    """
    blob = file.resolve()
    announced, size = blob.name, blob.stat().st_size
    if not file.is_symlink() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", announced):
        return  # on a disk without links the cache forgets the hash
    hasher = hashlib.sha256() if len(announced) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(blob, "rb") as content:
        while part := content.read(1 << 24):
            hasher.update(part)
            yield len(part)
    if hasher.hexdigest() != announced:
        file.unlink()
        blob.unlink()
        raise OSError(
            f"{file.name} of {repo} arrived damaged: it does not have the hash that the Hub "
            "announced, and was removed. Try again."
        )


def _check_free_space(repo: str, size: int):
    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size + FREE_SPACE_MARGIN > free:
        raise OSError(
            f"{repo} is a download of {size / 1e9:.1f} GB but {HF_HUB_CACHE} has only "
            f"{free / 1e9:.1f} GB free: make room, or point HF_HOME to another disk."
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """The Hub's client draws no bars of its own."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _progress_bar(on_progress: Progress | None) -> type[tqdm]:
    """A silent tqdm that hands the bytes that arrived to `on_progress`."""

    class ProgressBar(tqdm):
        def __init__(self, *args, **kwargs):
            # The Hub's client shows bytes received and bytes written in two bars; follow one.
            self.is_followed = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self.done = kwargs.get("initial") or 0
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def update(self, n=1):
            self.done += n or 0
            if on_progress and self.is_followed and self.total:
                on_progress("download", int(self.done), int(self.total))
            return super().update(n)

    return ProgressBar
