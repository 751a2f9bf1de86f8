"""Downloads checkpoints from the Hugging Face Hub, with one clear sentence when that fails."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from tqdm.auto import tqdm

# Called with what is being done ("download", "convert"), the bytes done and the bytes in all.
Progress = Callable[[str, int, int], None]

# Weights, configs, tokenizer files and a draft's frequency lists; never code.
ALLOWED = ["*.json", "*.jinja", "tokenizer.model", "*.bin", "*.pt", "*.safetensors", "freq_*"]
FREE_SPACE_MARGIN = 256 << 20  # what stays free on the disk after a download, in bytes


def is_local(path_or_repo: str | Path) -> bool:
    """Whether a name means something on this disk rather than on the Hub."""
    text = os.fspath(path_or_repo)
    return os.path.exists(text) or text.startswith((".", "/", "~")) or text.count("/") != 1


def commit_of(repo: str, revision: str | None = None) -> str:
    """The commit that a revision of a repository stands for, as far as the network can tell.

    Raises:
        ValueError: If the id or revision is unknown or not accessible.
        OSError: If the Hub cannot be reached and the repository was never downloaded.
    """
    try:
        return HfApi().model_info(repo, revision=revision).sha or revision or "main"
    except Exception as error:  # the HTTP library's errors are neither ValueError nor OSError
        _explain(error, repo, revision)
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(config, str):
            raise _unreachable(repo) from error
        return Path(config).parent.name


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
        patterns: Which files; all that are read of a model if None.

    Returns:
        The folder of the snapshot, whose name is the commit.

    Raises:
        ValueError: If the id or revision is unknown or not accessible.
        OSError: If the Hub cannot be reached, or the disk is too full.
    """
    try:
        files = snapshot_download(
            repo, revision=revision, allow_patterns=patterns or ALLOWED, dry_run=True
        )
    except Exception as error:  # the HTTP library's errors are neither ValueError nor OSError
        _explain(error, repo, revision)
        files = []  # no network: what was downloaded before still serves
    names = [file.filename for file in files]
    # The .bin files are the published ones; a repository with both needs no second copy.
    has_bin = any(name.endswith(".bin") for name in names)
    ignored = ["*.safetensors", "*.pt"] if has_bin else None
    wanted = [file for file in files if file.will_download]
    if has_bin:
        wanted = [file for file in wanted if not file.filename.endswith((".safetensors", ".pt"))]
    _check_free_space(repo, sum(file.file_size or 0 for file in wanted))
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns or ALLOWED,
            ignore_patterns=ignored,
            local_files_only=not files,
            tqdm_class=_progress_bar(on_progress),
        )
    except Exception as error:
        _explain(error, repo, revision)
        if isinstance(error, OSError) and error.errno:  # the disk's own error, such as a full one
            raise
        raise _unreachable(repo) from error
    return Path(folder)


def download_config(repo: str, revision: str | None = None) -> Path:
    """Brings a repository's config.json alone into the Hub's own cache.

    Raises:
        ValueError: If the id or revision is unknown or not accessible.
        OSError: If the Hub cannot be reached.
    """
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:
        _explain(error, repo, revision)
        raise _unreachable(repo) from error


def snapshot_folder(repo: str, commit: str) -> Path:
    """Where the Hub's cache keeps a commit of a repository, whether or not it is there."""
    name = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(HF_HUB_CACHE) / name / "snapshots" / commit


def upload(folder: Path, repo: str):
    """Uploads a converted folder to a repository of the user's, which is created if need be.

    Raises:
        OSError: If the Hub does not take it; the folder stays where it is.
    """
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{folder} is written, but {repo} could not be uploaded: {reason}") from error


def _unreachable(repo: str) -> OSError:
    return OSError(
        f"the Hub cannot be reached and {repo} was not downloaded before: check the network."
    )


def _explain(error: Exception, repo: str, revision: str | None):
    """Raises a clear ValueError where the Hub answered; returns where it could not be asked."""
    causes = (error, error.__cause__)
    if any(isinstance(cause, HFValidationError) for cause in causes):
        raise ValueError(f"{repo} is neither a folder here nor a Hub id (owner/name).") from error
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        raise ValueError(f"{repo} is gated: accept its terms on the Hub and log in.") from error
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        raise ValueError(f"{repo} has no revision {revision} on the Hub.") from error
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        raise ValueError(
            f"the Hub knows no {repo}: check its name, or log in if it is private."
        ) from error


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


def _progress_bar(on_progress: Progress | None) -> type[tqdm]:
    """A silent tqdm that hands the bytes that arrived to `on_progress`."""

    class ProgressBar(tqdm):
        def __init__(self, *args, **kwargs):
            # The Hub's client shows bytes received and bytes written in two bars; follow one.
            self.is_followed = kwargs.pop("name", None) == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def update(self, n=1):
            shown = super().update(n)
            if on_progress and self.is_followed and self.total:
                on_progress("download", int(self.n), int(self.total))
            return shown

    return ProgressBar
