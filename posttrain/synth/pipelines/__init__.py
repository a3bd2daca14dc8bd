"""From prompts to training data.

`rows` is what passes between steps; `pipeline` takes it through them and `report` counts what became of it; `step` is
the base of all steps, `view` a page to look at; `recipe` reads all this from YAML, `refresh` does it between epochs.
"""
