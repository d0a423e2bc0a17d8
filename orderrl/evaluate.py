"""Compare planners with hand-made orders on held-out images: `python -m orderrl.evaluate`."""

from pathlib import Path

from omegaconf import DictConfig

from orderrl import report
from orderrl.evaluation.comparison import in_order
from orderrl.evaluation.policies import chosen_policies
from orderrl.evaluation.protocol import open_protocol
from orderrl.evaluation.runs import save_results
from orderrl.evaluation.settings import eval_config
from orderrl.evaluation.table import evaluation_key, make_rows, pending_rows, pictures, publish_samples, tabulated
from orderrl.factory import open_backbone, section, setup_of
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import is_main, launched, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.run import Run


@isolated_float32
def evaluate(config: DictConfig) -> Path:
    """Evaluate all policies of a config and return the run folder with `results.json` and `report.html`."""
    # compose and build
    settings = eval_config(section(config, "eval"), config.data.name)
    setup = setup_of(config, open_backbone(config))
    policies = chosen_policies(settings, setup)
    pending = pending_rows(settings, setup, policies)
    protocol = open_protocol(settings, setup)
    key = evaluation_key(settings, setup, protocol.data, [policy for policy, _ in policies])
    # evaluate, and keep rows until all are there
    with Run("evaluate", config) as run, Job(setup.cache_dir, f"evaluation-{key}", instead=run.folder) as work:
        rows = make_rows(pending, protocol, work)
        if is_main():
            for number, row in enumerate(rows):
                run.log({key: value for key, value in row.row.items() if isinstance(value, float)}, number + 1)
            publish_samples(work, run.folder / "samples")
            # tell
            rows = in_order(rows)
            results = tabulated(protocol, rows)
            save_results(run.folder, results, rows)
            page = report.write_all(run.folder, results, pictures(protocol, rows))
            run.log_figures(sorted((run.folder / "figures").glob("*.png")))
            print_main(f"results: {run.folder / 'results.json'}\nreport: {page}")
    return run.folder


if __name__ == "__main__":
    run_application("evaluate", launched(evaluate))
