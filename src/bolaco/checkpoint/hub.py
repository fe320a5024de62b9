"""Uploading a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from bolaco.errors import CheckpointError, RecipeError


def check_hub(repository: str) -> None:
    """Stops before anything is computed if an upload could not begin.

    Raises:
        RecipeError: that is no name of a repository.
        CheckpointError: nobody is logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise RecipeError(f"--push-to-hub {repository}: a repository is called NAME or OWNER/NAME") from None
    try:
        HfApi().whoami()
    except Exception as error:  # the network can fail in any way
        raise CheckpointError(
            f"--push-to-hub {repository}: the hub does not know who you are ({_first_line(error)}); log in first "
            "(hf auth login), or set HF_TOKEN"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Uploads a folder as a model repository, which is made private if it is not there; returns its address.

    Raises:
        CheckpointError: the upload failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        made = hub.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Compressed by bolaco")
    except Exception as error:  # the network can fail in any way
        raise CheckpointError(
            f"{folder}: is written, but was not uploaded ({_first_line(error)}); try again with "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(made)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
