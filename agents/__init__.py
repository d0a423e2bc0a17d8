"""Agents: behaviour cloning, PPO, GRPO, joint tuning, baseline policies and the distribution of actions."""

from orderrl.agents.bc import BCConfig, clone
from orderrl.agents.distribution import RankedBlocks
from orderrl.agents.grpo import GRPO, GRPOConfig
from orderrl.agents.joint import JointConfig, JointTuning
from orderrl.agents.policies import PlannerPolicy, Policy, RankingPolicy, ReferencePolicy
from orderrl.agents.ppo import PPO, PPOConfig
from orderrl.agents.registry import NamedPolicy, make_policy, policy_names

__all__ = [
    "BCConfig",
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
    "make_policy",
    "policy_names",
]
