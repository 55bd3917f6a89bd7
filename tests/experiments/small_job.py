"""The main job's configuration, cut down to a few solves per method."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

CONF = Path(__file__).parents[2] / "conf"
SMALL = ["num_solves=4", "methods.parzen_search.num_startup=2"]


def compose(*overrides: str) -> DictConfig:
    """What Hydra makes of `conf/` with a few solves per method, unless `overrides` says otherwise."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=[*SMALL, *overrides])
