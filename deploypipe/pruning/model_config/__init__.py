"""A network's own config, written back where it provably describes what surgery left. The only door of this room."""

from deploypipe.pruning.model_config.write_back import ConfigFit, fit_configs, write_configs_

__all__ = ["ConfigFit", "fit_configs", "write_configs_"]
