"""Label random contexts with the value of every hidden block: `python -m orderrl.label`."""

from pathlib import Path

from omegaconf import DictConfig

from orderrl.factory import open_backbone, setup_of
from orderrl.labels import find_or_make_labels
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import launched, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run


@isolated_float32
def label(config: DictConfig) -> Path:
    """Make the labels of a config, or find them, and return their folder."""
    setup = setup_of(config, open_backbone(config))
    with Run("label", config) as run:
        folder = find_or_make_labels(setup, run=run)
        contexts = setup.labels.contexts
        run.write_json("labels.json", {"folder": str(folder), "contexts": contexts})
        print_main(f"labels: {contexts} contexts in {folder}\nrun: {run.folder}")
    return folder


if __name__ == "__main__":
    run_application("label", launched(label))
