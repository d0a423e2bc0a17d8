"""The keys of the commands themselves, a dataclass for each; those of the groups stand with what they configure."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from orderrl.runtime.registry import is_reference, trust
from orderrl.runtime.values import Rule, Settings, at_least, between, one_of, setting


@dataclass(frozen=True, kw_only=True)
class Command(Settings):
    """What commands share."""

    output_dir: str = setting("runs", "Folder in which run folders are made")
    device: str = setting("cpu", "Device on which the model runs, for example cuda")
    trust: list[str] = setting(
        [],
        "Own parts, as module:attribute, that files may name: a token set its tokeniser, a planner its objective, a "
        "specialist its policy and its start",
        Rule((), is_reference, "={} must be module:attribute"),
    )

    def __post_init__(self) -> None:
        from orderrl.runtime.devices import checked_device  # imports PyTorch

        super().__post_init__()
        checked_device(self.device)
        trust(*self.trust)


@dataclass(frozen=True, kw_only=True)
class Cached(Command):
    """Commands that keep what they make for reuse."""

    cache_dir: str = setting(
        "${oc.env:ORDERRL_CACHE,cache}", "Folder in which labels, planners and unfinished work are kept for reuse"
    )
    seed: int = setting(0, "Seed of everything random that has no seed of its own", at_least(0))


@dataclass(frozen=True, kw_only=True)
class Resumable(Cached):
    """Commands whose trainings keep their state."""

    checkpoint_seconds: float = setting(
        60.0, "Seconds between states that an interrupted run continues from", between("[0, 86400]")
    )


@dataclass(frozen=True, kw_only=True)
class Label(Cached):
    """Label random contexts with the value of every hidden block."""

    fsdp: bool = setting(False, "Split the backbone's weights over the processes of torchrun (FSDP2)")


@dataclass(frozen=True, kw_only=True)
class Train(Resumable):
    """Train a planner."""

    name: str | None = setting(
        None, "Name of the planner in tables; null makes one of agent, target and reasoning steps"
    )
    reuse: bool = setting(True, "Take the cached planner of an identical configuration instead of training again")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Cached):
    """Compare planners with hand-made orders on held-out images."""


@dataclass(frozen=True, kw_only=True)
class Policy(Cached):
    """Commands in which one policy acts."""

    policy: str = setting(
        "newest",
        "Policy that chooses the order: a baseline, newest, a planner checkpoint or module:attribute; generate also "
        "knows published, the model's own sampler",
    )


@dataclass(frozen=True, kw_only=True)
class Generate(Policy):
    """Draw images and show the order."""

    budgets: list[int] = setting([1], "Budgets of an own policy (module:attribute) without a schedule", at_least(1))
    label: int | None = setting(None, "Class of the images; null takes the classes in turn", at_least(0))
    n: int = setting(16, "Number of images", at_least(1))
    keep_samples: bool = setting(False, "Write every image as PNG too, samples/CLASS/000000.png")
    steps: int | None = setting(
        None,
        "For policy=published, steps or iterations of its schedule; null draws one token a step (MAR: 64 iterations)",
        at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budgets:
            raise ValueError("budgets must not be empty, got []")


@dataclass(frozen=True, kw_only=True)
class Rollouts(Policy):
    """Record episodes as transitions."""

    split: str = setting(
        "planner",
        "Split of the data: planner, or test to keep apart what planners were trained on",
        one_of(("planner", "test")),
    )
    n: int = setting(256, "Number of episodes; images are taken in turn", at_least(1))
    batch_size: int = setting(64, "Episodes at once", at_least(1))
    output: str | None = setting(None, "New folder of the transitions; null is transitions/ in the run's folder")
    minari: str | None = setting(
        None,
        "Id of a Minari data set that is made too, such as orderrl/digits-v0 (pip install 'orderrl[minari]'); null "
        "makes none",
    )
    env: RecordedEnv = setting({}, "What is recorded")


@dataclass(frozen=True, kw_only=True)
class RecordedEnv(Settings):
    """The budgets of a recorded environment, which are a policy's own where nothing else is asked for."""

    budgets: tuple[int, ...] | None = setting(
        None,
        "Numbers of blocks that a step of the recorded environment may reveal; null takes the policy's own",
        at_least(1),
    )


@dataclass(frozen=True, kw_only=True)
class Pretrain(Resumable):
    """Train a backbone, or a tokeniser, or both."""

    fsdp: bool = setting(False, "Split the backbone's weights over the processes of torchrun (FSDP2)")


@dataclass(frozen=True, kw_only=True)
class Tokenize(Command):
    """Turn an image folder into a token set."""

    output: str = setting(MISSING, "Folder of the token set; one that is there is continued")
    batch_size: int = setting(32, "Images per call; all their crops and flips go together", at_least(1))
    shard_size: int = setting(5000, "Images per shard", at_least(1))


@dataclass(frozen=True, kw_only=True)
class Reproduce(Resumable):
    """Train and evaluate all planners of a suite over several seeds."""

    seeds: list[int] = setting(MISSING, "Training seeds of every planner", at_least(0))
    runs: list[list[str]] = setting([], "Overrides of `python -m orderrl.train`, one trained planner each")
    specialists: list[list[str]] = setting(
        [],
        "Overrides of `python -m orderrl.pretrain`, one backbone each that is trained for an order; {0} stands for the "
        "planner of the first run",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ValueError("seeds must not be empty, got []")
        if not self.runs and not self.specialists:
            raise ValueError("runs and specialists must not both be empty, got [] and []")
