"""The main job: `python -m experiments.run`, with overrides such as `dataset=digits` or `--multirun seed=0,1,2`."""

from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Builds the comparison that `conf/config.yaml` describes and runs it in Hydra's run directory."""
    torch.set_num_threads(config.num_threads)
    comparison = hydra.utils.instantiate(config.comparison)
    settings = OmegaConf.to_container(config.comparison, resolve=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    comparison.run(folder, settings, resume=config.resume)
    print(f"\nfigure, table and metrics: {folder}")


if __name__ == "__main__":
    main()
