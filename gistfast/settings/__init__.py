"""What users may choose, declared once: command line, Python and settings file read the same dataclasses.

base          how a setting is declared, read and checked
file          settings from YAML or JSON
stages        of precompute, evaluate and the smaller commands
train         of a training run; train_checks, which do nothing beside others
store         of the commands that look after a store
"""
