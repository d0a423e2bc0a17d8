"""Analyse planners on held-out images: `python -m orderrl.analyze`.

Do their scores use content, do the blocks they choose help the rest, and how do their orders compare? How much headroom
does content give at all, and what do latents do?
"""

from pathlib import Path

from omegaconf import DictConfig

from orderrl.evaluation.ablations import (
    checked_counts,
    content_entries,
    injection_entries,
    order_entries,
    quality_curves,
)
from orderrl.evaluation.headroom import measure_headroom
from orderrl.evaluation.latents import latent_entries
from orderrl.evaluation.policies import chosen_policies, gain_labels, seeds_named
from orderrl.evaluation.protocol import open_protocol
from orderrl.evaluation.rows import evaluate_policy, first_choices
from orderrl.evaluation.settings import HeadroomConfig, eval_config
from orderrl.factory import open_backbone, section, setup_of
from orderrl.report.analysis import print_analysis
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run


@isolated_float32
def analyze(config: DictConfig) -> Path:
    """Run all analyses, refuse what is unknown or does not fit, and return the run folder with `analysis.json`."""
    # compose and build
    settings = eval_config(section(config, "eval"), config.data.name)
    headroom = None if config.headroom is None else HeadroomConfig(**section(config, "headroom"))
    setup = setup_of(config, open_backbone(config))
    setup.require_order_robust("analyze")
    counts = checked_counts(config.injected, setup.backbone)
    policies = seeds_named([named for named, _ in chosen_policies(settings, setup)])
    protocol = open_protocol(settings, setup)
    with Run("analyze", config) as run:
        # every policy as in an evaluation
        rows = []
        with progress(len(policies), "evaluating", "policies") as advance:
            for named in policies:
                rows.append(evaluate_policy(protocol, named, sampled=False))
                advance(note=named.name)
        scores = {named.name: first_choices(protocol, named)[1] for named in policies}
        # each question by itself
        results = {
            "protocol": protocol.described(),
            "content": content_entries(protocol, policies),
            "injection": injection_entries(protocol, scores, counts),
            "orders": order_entries(protocol, rows),
            "curves": {row.row["policy"]: quality_curves(protocol, row.rollout) for row in rows if row.rollout},
            "headroom": None if headroom is None else measure_headroom(protocol, gain_labels(setup), headroom),
            "latents": latent_entries(protocol, policies),
        }
        path = run.write_json("analysis.json", results)
        print_analysis(results)
        print_main(f"analysis: {path}")
    return run.folder


if __name__ == "__main__":
    run_application("analyze", analyze)
