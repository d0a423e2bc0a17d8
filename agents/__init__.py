"""Agents: cloning, PPO, GRPO, fitted Q iteration, joint tuning, baseline policies and the distribution of actions."""

from orderrl.agents.bc import Config as BCConfig
from orderrl.agents.bc import clone
from orderrl.agents.distribution import RankedBlocks
from orderrl.agents.fitted_q import Config as FittedQConfig
from orderrl.agents.fitted_q import fit_budgets, record_order
from orderrl.agents.grpo import GRPO
from orderrl.agents.grpo import Config as GRPOConfig
from orderrl.agents.joint import Config as JointConfig
from orderrl.agents.joint import JointTuning
from orderrl.agents.policies import PlannerPolicy, Policy, RankingPolicy, ReferencePolicy
from orderrl.agents.ppo import PPO
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.agents.registry import NamedPolicy, make_policy, policy_names

__all__ = [
    "BCConfig",
    "FittedQConfig",
    "GRPO",
    "GRPOConfig",
    "JointConfig",
    "JointTuning",
    "NamedPolicy",
    "PPO",
    "PPOConfig",
    "PlannerPolicy",
    "Policy",
    "RankedBlocks",
    "RankingPolicy",
    "ReferencePolicy",
    "clone",
    "fit_budgets",
    "make_policy",
    "policy_names",
    "record_order",
]
