"""A folder in the place of the Hugging Face Hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest


def put_in_place_of_the_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads go to root/OWNER/NAME, and downloads come from there."""

    def upload(api: Any, *, repo_id: str, folder_path: str) -> str:
        shutil.copytree(folder_path, root / repo_id)
        return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda api, repository, **_: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision=None: str(root / name / file))
