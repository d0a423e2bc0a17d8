"""Agents, the policies that they are compared with, and the distribution of actions; each in a module of its own."""
