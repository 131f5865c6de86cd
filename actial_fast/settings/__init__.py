"""Recipes: everything that a run can be told. recipe.py has the two recipes, model.py, running.py and sampling.py what they are made
of, each field with its meaning; config.py puts YAML and key=value onto them.

Here lives no behaviour: a setting is read by what it sets.
"""
