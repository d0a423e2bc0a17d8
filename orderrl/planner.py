"""The latent planner ("OrderHead"): scores hidden blocks, chooses a budget, estimates the return.

Notable:
- Block tokens are the projected observation plus a learned position; a stem of timm blocks reads them.
- Latent reasoning: R passes of one weight-shared core over the block tokens and a few scratchpad latents,
  carried from pass to pass and never decoded (Chain of Continuous Thought, Hao et al., 2024). R = 0 is the
  one-shot planner; the same weights run with any R.
- `TokenOrderHead` is the research notes' estimator of the same name: scores of the hidden states of all positions.
- Sets (`pairs`): a bilinear form of the block tokens predicts how much two blocks depend on each other given what is
  visible; blocks listed in one step take it from each other's logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.backbones.registry import require_made_for
from orderrl.runtime.checkpoint import load_checkpoint, rebuild, save_checkpoint
from orderrl.runtime.finite import DIVERGED, require_finite
from orderrl.runtime.hub import hub_file, push_to_hub
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.values import at_least, between, check_fields, one_of, require_kind, setting
from orderrl.runtime.weights import HUB

if TYPE_CHECKING:
    from tensordict import TensorDictBase


NETWORKS = ("latent", "orderhead")


@dataclass(frozen=True)
class PlannerConfig:
    """Shape of an `OrderHead`."""

    num_blocks: int  # B
    hidden_size: int  # D, width of the backbone's hidden states
    num_classes: int  # class labels
    num_budgets: int = 1  # budgets to choose from
    token_dim: int = 0  # C, width of a block's true tokens, which network orderhead may read in training; 0 reads none
    network: str = setting(
        "latent",
        "Network: latent (block tokens, latent reasoning, heads for budgets and value) or orderhead (the research "
        "notes' scorer of hidden states: stem blocks, latents as registers, no other heads)",
        one_of(NETWORKS),
    )
    dim: int = setting(64, "Width", at_least(1))
    stem: int = setting(2, "Transformer blocks before the core", at_least(0))
    core: int = setting(1, "Transformer blocks of the weight-shared core", at_least(1))
    heads: int = setting(4, "Attention heads", at_least(1))
    latents: int = setting(4, "Scratchpad latents", at_least(1))
    reasoning_steps: int = setting(0, "R, passes of the core; 0 is the one-shot planner", between("[0, 1000]"))
    content: bool = setting(
        True, "Read hidden states and entropies; false sees places, what is visible and the class alone"
    )
    visible_states: bool = setting(
        False, "Read the hidden states of visible blocks too; false sees zeros in their place"
    )
    privileged: bool = False  # also read context losses (a critic in training)
    dropout: float = setting(0.1, "Dropout rate in cloning and fitted Q iteration", between("[0, 1)"))
    pairs: bool = setting(
        False,
        "Predict the dependence of every two blocks, by which those of one step keep apart; false uses places alone",
    )
    # lowest and highest cost of a step, nats per image, that the observation tells; None tells none
    step_cost_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, at_least(1, "num_blocks", "hidden_size", "num_classes", "num_budgets"))
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")
        if self.network == "orderhead":
            self._require_scores_alone()
        if self.step_cost_range is not None:  # a list in checkpoints
            low, high = self.step_cost_range
            if not 0 < low < high:
                raise ValueError(f"step_cost_range must be (low, high) with 0 < low < high, got {(low, high)}")
            object.__setattr__(self, "step_cost_range", (low, high))

    def _require_scores_alone(self) -> None:
        """Refuse what the notes' scorer has no part for."""
        asked = {
            "reasoning_steps": self.reasoning_steps > 0, "content": not self.content, "pairs": self.pairs,
            "privileged": self.privileged, "num_budgets": self.num_budgets > 1,
            "step_cost_range": self.step_cost_range is not None,
        }  # fmt: skip
        for name, wrong in asked.items():
            if wrong:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for network=latent: network=orderhead scores hidden states and "
                    "does nothing else"
                )

    def require_pairs(self, what: str) -> None:
        """Raise ValueError, saying what needs them, if the planner has no `pairs`."""
        if not self.pairs:
            raise ValueError(
                f"{what} needs a planner with pairs=True, this one has pairs=False; train one with planner.pairs=true"
            )

    def require_budgets(self, budgets: tuple[int, ...]) -> None:
        """Raise ValueError if the planner chooses among another number of budgets."""
        if self.num_budgets != len(budgets):
            raise ValueError(f"budgets={budgets} need a planner with {len(budgets)} budgets, not {self.num_budgets}")

    @classmethod
    def for_backbone(cls, backbone: Backbone, **shape: Any) -> PlannerConfig:
        """The config that fits a backbone."""
        width = token_width(backbone) if shape.get("network") == "orderhead" else 0
        return cls(backbone.geometry.num_blocks, backbone.hidden_size, backbone.num_classes, token_dim=width, **shape)


def checked_shape(**shape: Any) -> PlannerConfig:
    """A shape from the config group `planner`, for a backbone that is still to come."""
    return PlannerConfig(num_blocks=1, hidden_size=1, num_classes=1, **shape)


def token_width(backbone: Backbone) -> int:
    """C, values that stand for a true token: a continuous token's own, else those of its embedding; 0 if none are."""
    if channels := getattr(backbone, "token_dim", 0):
        return int(channels)
    table = getattr(backbone, "tok_embeddings", None)
    return 0 if table is None else int(table.weight.shape[1])


class PlannerOutput(NamedTuple):
    """What an `OrderHead` says about M states."""

    scores: Tensor  # (M, B), the worth of each block
    logits: Tensor  # (M, B), the policy's block logits: scores times the learned sharpness
    budget_logits: Tensor  # (M, num_budgets)
    value: Tensor  # (M, 1), the return from here on
    # (M, B, B), symmetric, how much two blocks tell about each other; zero without `pairs`. Trained by cloning target
    # "pairs" it is (G[a, b] + G[b, a]) / 2 in standard deviations. The diagonal means nothing
    dependence: Tensor
    repulsion: Tensor  # (M, B, B), what block a, once listed, takes from the logit of block b in the same step


class PairHead(nn.Module):
    """Symmetric bilinear form of block tokens, (M, B, dim) -> (M, B, B), of rank dim / 4; zero at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        rank = max(dim // 4, 1)
        self.left, self.right = nn.Linear(dim, rank), nn.Linear(dim, rank)
        nn.init.zeros_(self.right.weight)
        nn.init.zeros_(self.right.bias)
        # what one unit of dependence takes from a block's score; not zero, or nothing would move the zeros above
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        product = self.left(x) @ self.right(x).mT / self.left.out_features**0.5
        return (product + product.mT) / 2


class OrderHead(nn.Module):
    """Planner over block tokens; reads an observation TensorDict, batch (M,)."""

    @isolated_float32
    def __init__(self, config: PlannerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.project_hidden = nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, dim))
        self.project_scalars = nn.Linear(3, dim)  # entropy, visible, fraction
        self.project_losses = nn.Linear(1, dim) if config.privileged else None
        self.project_step_cost = nn.Linear(1, dim) if config.step_cost_range else None
        self.position = nn.Parameter(0.02 * torch.randn(config.num_blocks, dim))
        self.label = nn.Embedding(config.num_classes, dim)
        self.scratchpad = nn.Parameter(0.02 * torch.randn(config.latents, dim))
        self.stem = nn.Sequential(*self._blocks(config.stem))
        self.core = nn.Sequential(*self._blocks(config.core))
        self.norm = nn.LayerNorm(dim)
        self.score_head = nn.Linear(dim, 1)
        self.budget_head = nn.Linear(dim, config.num_budgets)
        self.value_head = nn.Linear(dim, 1)
        for head in (self.score_head, self.budget_head, self.value_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        if self.project_step_cost is not None:  # costs change nothing at the start
            nn.init.zeros_(self.project_step_cost.weight)
            nn.init.zeros_(self.project_step_cost.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        # the part of the repulsion that is the same in every state; planners of one block a step leave it zero
        self.repulsion = nn.Parameter(torch.zeros(config.num_blocks, config.num_blocks))
        self.sharpness = nn.Parameter(torch.zeros(()))  # log of the factor from scores to policy logits
        self.pair_head = PairHead(dim) if config.pairs else None

    @classmethod
    def from_pretrained(cls, source: Path | str, backbone: Backbone | None = None) -> OrderHead:
        """A trained planner, in eval mode.

        Args:
            source: a file, the folder of a run, or a repository of the Hugging Face Hub, `OWNER/NAME[@REVISION]`.
            backbone: the one that it was trained on; the planner is then on its device.

        Raises:
            ValueError: if it cannot be found, is no planner, or was trained for a backbone of another shape or data.
        """
        return load_planner(hub_file(source, "planner"), backbone)[0]

    def push_to_hub(self, repository: str, description: Mapping[str, Any], results: str = "") -> str:
        """Upload the planner with a model card made of its description, as `load_planner` gives it.

        Arguments and result as of `orderrl.runtime.hub.push_to_hub`, which takes a file.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / "planner.safetensors"
            save_planner(path, self, dict(description))
            return push_to_hub(path, repository, results)

    def _blocks(self, depth: int) -> list[nn.Module]:
        from timm.models.vision_transformer import Block  # takes long to import

        c = self.config
        return [Block(c.dim, c.heads, mlp_ratio=2.0, qkv_bias=True, proj_drop=c.dropout) for _ in range(depth)]

    def encode(self, observation: TensorDictBase, reasoning_steps: int | None = None) -> Tensor:
        """Block tokens after R passes: (M, B, dim)."""
        visible = observation["visible"].float()
        content = float(self.config.content)
        fraction = observation["fraction"].expand_as(visible)
        scalars = torch.stack([content * observation["entropy"], visible, fraction], dim=-1)
        x = self.project_scalars(scalars) + self.position + self.label(observation["label"])[:, None]
        if self.config.content:
            x = x + self.project_hidden(observation["hidden"])
        if self.project_losses is not None:
            x = x + self.project_losses(observation["context_loss"][..., None])
        if self.project_step_cost is not None:
            if "step_cost" not in observation:
                raise ValueError(
                    f"this planner was trained on step costs in the range {self.config.step_cost_range} and needs "
                    "one: act in an environment whose step_cost is a range, or at one cost, for example "
                    "PATH.safetensors@cost0.5 by name, or planner.at_step_cost(0.5)"
                )
            x = x + self.project_step_cost(self._standardised(observation["step_cost"]))[:, None]
        x = self.stem(x)
        steps = self.config.reasoning_steps if reasoning_steps is None else reasoning_steps
        latents = self.scratchpad.expand(len(x), -1, -1)
        for _ in range(steps):
            both = self.core(torch.cat([x, latents], dim=1))
            x, latents = both[:, : self.config.num_blocks], both[:, self.config.num_blocks :]
        return self.norm(x)

    def forward(self, observation: TensorDictBase, reasoning_steps: int | None = None) -> PlannerOutput:
        """Scores, value and all that the policy's distribution is made from, for the environment's observations."""
        x = self.encode(observation, reasoning_steps)
        pooled = x.mean(1)
        scores, sharpness = self.score_head(x)[..., 0], self.sharpness.exp()
        repulsion = self.repulsion.expand(len(x), -1, -1)
        dependence = scores.new_zeros(()).expand_as(repulsion)
        if self.pair_head is not None:
            dependence = self.pair_head(x)
            # in units of scores, so sharper logits keep the balance between a block's worth and its dependence
            repulsion = repulsion + sharpness * self.pair_head.strength * dependence
        return PlannerOutput(
            scores, sharpness * scores, self.budget_head(pooled), self.value_head(pooled), dependence, repulsion
        )

    @torch.no_grad()
    def require_finite_outputs(self, where: object) -> None:
        """Refuse weights from which scores would not be finite; weights that are may still overflow.

        Args:
            where: the planner is, for the message.

        Raises:
            NotFiniteError: if an output is not finite in a state of which nothing is visible.
        """
        from tensordict import TensorDict

        blocks, like = self.config.num_blocks, self.position
        observation = {
            "hidden": like.new_zeros(1, blocks, self.config.hidden_size),
            "entropy": like.new_zeros(1, blocks),
            "visible": like.new_zeros(1, blocks, dtype=torch.bool),
            "label": like.new_zeros(1, dtype=torch.int64),
            "fraction": like.new_zeros(1, 1),
            "context_loss": like.new_zeros(1, blocks),
            "step_cost": like.new_full((1, 1), math.sqrt(math.prod(self.config.step_cost_range or (1.0, 1.0)))),
        }
        require_finite(where, self(TensorDict(observation, batch_size=[1]))._asdict(), DIVERGED)

    def _standardised(self, step_cost: Tensor) -> Tensor:
        """Logarithms of costs with mean 0 and variance 1 over the range that they are drawn from."""
        assert self.config.step_cost_range is not None
        low, high = self.config.step_cost_range
        return (step_cost.log() - math.log(low * high) / 2) * (math.sqrt(12) / math.log(high / low))

    @torch.no_grad()
    def set_pair_strength(self, strength: float) -> None:
        """Set what one unit of dependence takes from a block's score, a learnable number.

        Raises:
            ValueError: if the planner has no `pairs`, or the strength is not finite.
        """
        self.config.require_pairs(f"pair_strength={strength:g}")
        require_kind("strength", strength, float)
        assert self.pair_head is not None
        self.pair_head.strength.fill_(strength)

    @isolated_float32
    def with_budgets(self, num_budgets: int, step_cost_range: tuple[float, float] | None = None) -> OrderHead:
        """A copy with another number of budgets; the budget head starts anew (uniform) if it changes.

        The copy sees costs in the range; None keeps the planner's own. Until it is trained it does what this planner
        does, at every cost.
        """
        costs = step_cost_range or self.config.step_cost_range
        other = OrderHead(replace(self.config, num_budgets=num_budgets, step_cost_range=costs)).train(self.training)
        kept = self.state_dict()
        if num_budgets != self.config.num_budgets:
            kept = {k: v for k, v in kept.items() if not k.startswith("budget_head.")}
        if self.project_step_cost is not None and costs != self.config.step_cost_range:
            # the same function of the cost in the other range's units: ours = shift + scale * theirs
            ends = self._standardised(torch.tensor(costs))
            shift, scale = ends.mean().item(), (ends[1] - ends[0]).item() / math.sqrt(12)
            weight = kept["project_step_cost.weight"]
            kept["project_step_cost.bias"] = kept["project_step_cost.bias"] + shift * weight[:, 0]
            kept["project_step_cost.weight"] = scale * weight
        missing, unexpected = other.load_state_dict(kept, strict=False)
        assert not unexpected and all(key.startswith(("budget_head.", "project_step_cost.")) for key in missing)
        return other.to(self.position.device)

    @isolated_float32
    def at_step_cost(self, step_cost: float) -> OrderHead:
        """A copy that acts at one step cost, in any environment.

        Args:
            step_cost: nats per image.

        Raises:
            ValueError: if the planner was trained on no range of costs, or on none that has this one.
        """
        limits = self.config.step_cost_range
        if self.project_step_cost is None or limits is None:
            raise ValueError(
                f"step_cost={step_cost:g} cannot be chosen: this planner was not trained on a range of step costs "
                "(env.step_cost=[LOW,HIGH])"
            )
        if not limits[0] <= step_cost <= limits[1]:
            raise ValueError(
                f"step_cost={step_cost:g} lies outside the range that the planner was trained on, "
                f"{limits[0]:g} to {limits[1]:g} nats per image"
            )
        other = copy.deepcopy(self)
        with torch.no_grad():
            cost = self._standardised(torch.tensor([step_cost], device=self.position.device))
            other.position.add_(self.project_step_cost(cost))  # both are added to every block token
        other.config, other.project_step_cost = replace(self.config, step_cost_range=None), None
        return other


class TokenOrderHead(OrderHead):
    """The research notes' OrderHead: scores (M, B) of hidden states, higher is earlier; `stem` is their L.

    Its only heads are the scores: budget logits and value are zero, there is one budget, and agents that need more
    refuse it. Register tokens (`latents`) stand in front and are discarded at the end.
    """

    @isolated_float32
    def __init__(self, config: PlannerConfig) -> None:
        nn.Module.__init__(self)
        from timm.models.vision_transformer import Block  # takes long to import

        self.config, c = config, config
        self.input = nn.Sequential(nn.Linear(c.hidden_size, c.dim), nn.LayerNorm(c.dim))
        self.true_input = nn.Sequential(nn.Linear(c.token_dim, c.dim), nn.LayerNorm(c.dim)) if c.token_dim else None
        self.registers = nn.Parameter(0.02 * torch.randn(1, c.latents, c.dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, c.latents + c.num_blocks, c.dim))
        self.blocks = nn.Sequential(
            *(Block(c.dim, c.heads, mlp_ratio=4.0, qkv_bias=True, proj_drop=c.dropout) for _ in range(c.stem))
        )
        self.head = nn.Sequential(nn.Linear(c.dim, c.dim // 2), nn.GELU(), nn.Linear(c.dim // 2, 1))

    def score(self, states: Tensor, true_tokens: Tensor | None = None, routed: Tensor | None = None) -> Tensor:
        """Scores (M, B) of hidden states (M, B, D).

        Args:
            true_tokens: (M, B, C), for training and analyses alone: policies have no way to give them.
            routed: (M,) bool, images of which these are read instead of the states; None is all.

        Raises:
            ValueError: if the network has no input for true tokens.
        """
        x = self.input(states)
        if true_tokens is not None:
            if self.true_input is None:
                raise ValueError("true tokens can't be read: this planner was made for a backbone without embeddings")
            seen = self.true_input(true_tokens)
            x = seen if routed is None else torch.where(routed[:, None, None], seen, x)
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.blocks(x)[:, self.config.latents :])[..., 0]

    def forward(self, observation: TensorDictBase, reasoning_steps: int | None = None) -> PlannerOutput:
        """Scores of the environment's observations; see `OrderHead.forward`.

        Raises:
            ValueError: if it reads the states of visible blocks and they are not there.
        """
        states, visible = observation["hidden"], observation["visible"]
        if self.config.visible_states and bool((visible & (states == 0).all(-1)).any()):
            raise ValueError(
                "this planner reads the states of visible blocks too, and they are zero here; let a policy with "
                "reads_visible_states=True ask for them, or train with planner.visible_states=false"
            )
        scores = self.score(states)
        zeros = scores.new_zeros(len(scores), 1)
        none = scores.new_zeros(()).expand(len(scores), *2 * [self.config.num_blocks])
        return PlannerOutput(scores, scores, zeros, zeros, none, none)

    def with_budgets(self, num_budgets: int, step_cost_range: tuple[float, float] | None = None) -> OrderHead:
        """Refused: the network scores blocks and chooses no budgets."""
        raise ValueError("a planner with network=orderhead chooses no budgets; use planner.network=latent")


def new_planner(config: PlannerConfig) -> OrderHead:
    """A planner with fresh weights, of the network that its config names."""
    return TokenOrderHead(config) if config.network == "orderhead" else OrderHead(config)


def save_planner(path: Path, planner: OrderHead, description: dict[str, Any]) -> None:
    """Write a planner as safetensors with its config and a description (agent, budgets, backbone, data).

    Raises:
        NotFiniteError: if its weights or its scores are not finite.
    """
    planner.require_finite_outputs(path)
    save_checkpoint(path, planner.state_dict(), {**description, "kind": "planner", "shape": asdict(planner.config)})


@isolated_float32
def load_planner(path: Path | str, backbone: Backbone | None = None) -> tuple[OrderHead, dict[str, Any]]:
    """Read a planner and its description.

    Args:
        path: a file, the folder of a run, or `hf://OWNER/NAME` of the Hub.
        backbone: that it is to read, as `require_reads` says.

    Raises:
        ValueError: if the file is no planner, its shape is none of this version's, or it is not for the backbone.
    """
    path = hub_file(path, "planner") if str(path).startswith(HUB) or Path(path).is_dir() else Path(path)
    tensors, description = load_checkpoint(path, "planner")
    try:
        config = PlannerConfig(**description["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its planner shape is none of this version's ({error}); train it anew") from error
    planner = rebuild(lambda: new_planner(config), description["shape"], tensors, path)
    if backbone is not None:
        require_reads(path, planner, description, backbone)
    return planner.eval(), description


def require_reads(path: Path | str, planner: OrderHead, description: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a planner for a backbone of another shape or of other data; move it to the backbone's device."""
    fitting = PlannerConfig.for_backbone(backbone)
    for name in ("num_blocks", "hidden_size", "num_classes"):
        have, want = getattr(planner.config, name), getattr(fitting, name)
        if have != want:
            raise ValueError(
                f"{path}: planner with {name}={have} does not fit the backbone's {name}={want}; train one for this "
                "backbone with `python -m orderrl.train agent=bc`"
            )
    require_made_for(path, description, backbone)
    planner.to(backbone_device(backbone))


def require_described(path: Path | str, planner: OrderHead, description: Mapping[str, Any]) -> None:
    """Refuse a planner whose description does not say by which agent, for what and with which budgets it was made."""
    kinds = {"agent": dict, "objective": str, "seed": int, "budgets": list[int], "name": str | None, "env": dict | None}
    try:
        for key, kind in kinds.items():
            require_kind(key, description.get(key), kind)
        require_kind("agent.name", description["agent"].get("name"), str)
        budgets = tuple(description["budgets"])
        planner.config.require_budgets(budgets)
        if list(budgets) != sorted(set(budgets)) or budgets[0] < 1 or budgets[-1] > planner.config.num_blocks:
            raise ValueError(f"budgets={list(budgets)} must ascend from 1 to at most {planner.config.num_blocks}")
    except ValueError as error:
        raise ValueError(f"{path}: does not say how it was trained ({error}); train it anew") from error
