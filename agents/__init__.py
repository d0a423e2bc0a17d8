"""Agents: behaviour cloning, PPO, baseline policies and the distribution of actions."""

from orderrl.agents.bc import BCConfig, clone
from orderrl.agents.distribution import RankedBlocks
from orderrl.agents.policies import PlannerPolicy, Policy, RankingPolicy, ReferencePolicy
from orderrl.agents.ppo import PPO, PPOConfig
from orderrl.agents.registry import NamedPolicy, make_policy, policy_names

__all__ = [
    "BCConfig",
    "NamedPolicy",
    "PPO",
    "PPOConfig",
    "PlannerPolicy",
    "Policy",
    "RankedBlocks",
    "RankingPolicy",
    "ReferencePolicy",
    "clone",
    "make_policy",
    "policy_names",
]
