"""Whether the hub can be asked: a misspelt folder looks like a name on it, and its client retries for minutes."""

from __future__ import annotations

from bolaco.errors import BolacoError

SECONDS = 10.0


def check_hub(name: str, file: str, error: type[BolacoError], kind: str | None = None) -> None:
    """Stops at once where the hub cannot be reached for a name that is no folder here.

    What the hub says of the name is left to whoever loads it; so is a name that is in the local cache, and everything
    where the hub is switched off (``HF_HUB_OFFLINE``).

    Args:
        name: of a repository.
        file: one that each of this kind has.
        error: is raised.
        kind: of the repository, ``dataset`` or None for a model.

    Raises:
        BolacoError: of the type given.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as why:  # of httpx or requests, as its version has it
        reason = " ".join(str(why).split()) or type(why).__name__
        raise error(f"{name}: no such folder here, and the hub cannot be reached: {reason[:200]}") from why
