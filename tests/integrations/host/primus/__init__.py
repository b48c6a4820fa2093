"""The least of Primus v26.5 that a backend meets: its registry, its adapter's base, its runtime and its command line.

Written from the facts about it, so that a test without a checkout pins signatures, lifecycle and order.
"""
