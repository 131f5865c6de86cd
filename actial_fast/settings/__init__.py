"""Recipes: everything that a run can be told. recipe.py holds the fields with their meanings, config.py puts YAML and key=value onto them.

Here lives no behaviour: a setting is read by what it sets.
"""
