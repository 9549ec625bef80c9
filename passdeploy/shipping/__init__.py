"""Shipping: sealed bundles, a runner without torch, configurations of inference servers.

Empty on purpose: importing `passdeploy.shipping.runner` must not pull in what only the writers need.
"""
