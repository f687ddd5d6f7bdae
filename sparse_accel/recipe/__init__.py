"""Recipes: from YAML to modifiers that act in time. `sparse_accel.recipe.schema.Recipe` is the way in."""
