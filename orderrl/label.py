"""Label random contexts with the value of every hidden block: `python -m orderrl.label`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from orderrl.pipeline import announce, find_or_make_labels, open_backbone
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import launched
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run


@isolated_float32
def label(config: DictConfig) -> Path:
    """Make the labels of a config, or find them, and return their folder."""
    backbone = open_backbone(config)
    with Run("label", config) as run:
        folder = find_or_make_labels(config, backbone, run=run)
        contexts = config.labels.contexts
        run.write_json("labels.json", {"folder": str(folder), "contexts": contexts})
        announce(f"labels: {contexts} contexts in {folder}\nrun: {run.folder}")
    return folder


if __name__ == "__main__":
    run_application("label", launched(label))
