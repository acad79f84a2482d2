"""What accelerate's launcher starts in the tests of several processes: the recipes named, one after the other, the imports paid for once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from masters.distill.recipe import read_recipe
from masters.distill.stages import distill

torch.set_num_threads(1)
for recipe in sys.argv[1:]:
    distill(read_recipe(Path(recipe)))
