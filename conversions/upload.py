"""Sends a converted folder to the Hub, through the client's own API.

Owns the repository's creation and the translation of what the client raises. The client takes an interrupted upload up
where it broke when the same call is made again.
"""

import re
from pathlib import Path

from mlx_gemma4.conversions import hub
from mlx_gemma4.errors import ModelNotFoundError, UsageError


def check_name(repo: str) -> None:
    """Raises UsageError unless `repo` looks like owner/name, and when there is no token to write with."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"--upload takes a Hub repository such as owner/name, not {repo!r}")


def send(folder: Path, repo: str, *, token: str | None = None) -> str:
    """The commit's address. Raises ModelNotFoundError without write access, Gemma4Error when the network fails."""
    from huggingface_hub import HfApi, get_token

    if not (token or get_token()):
        raise ModelNotFoundError(
            f"there is no token to upload {folder} with; set HF_TOKEN or run `hf auth login`, then `hf upload {repo} "
            f"{folder}`"
        )
    api = HfApi(token=token, library_name="mlx-gemma4")
    try:
        api.create_repo(repo, exist_ok=True)
        message = "Converted with mlx-gemma4"
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url
    except Exception as e:
        explained = hub.explain(e, repo, token)
        if explained is e:
            raise
        raise explained from e
