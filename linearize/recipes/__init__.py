"""Recipes: a conversion and the stages of training after it, as data (YAML), and what runs them.

The files beside this one are shipped. A recipe names its `source`, how to `convert` (the arguments of that verb), a
number of `tokens`, and `stages`, each with a `name`, a `kind` (transfer, mixing, blocks, logits, finetune), its
`share` of the tokens (any unit: shares are relative) or its own `tokens`, and the options of that kind. `per_mixer`
maps a mixer to keys, as `--set` spells them, that differ for it, and `with_softmax` holds keys that differ where
`convert.keep_softmax` keeps something; `mixer` says which mixers `convert.to` may name.
"""

from __future__ import annotations

from .recipe import Recipe, Stage, load, shipped

__all__ = ["Recipe", "Stage", "load", "shipped"]
