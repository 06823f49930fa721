"""Mutants for tools/mutate.py: one wrong edit each, made by rule from the sources and the weight maps."""
