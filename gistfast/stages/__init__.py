"""The three stages, one module each: precompute, train, evaluate.

A folder of their own, because `gistfast.precompute` and `gistfast.train` are functions: a module of the
same name beside them would take the name over as soon as anything imports it.
"""
