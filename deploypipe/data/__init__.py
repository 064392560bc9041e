"""Data as people have it: batches in memory (`TensorBatches`), and any loader's batches as pairs (`Pairs`).

Most loaders need neither: see `batch_forms` for what is read as it is.
"""

from deploypipe.data.batch_forms import as_pair
from deploypipe.data.pairs import Pairs
from deploypipe.data.repeatable import require_repeatable, set_epoch
from deploypipe.data.tensor_batches import Augment, TensorBatches, random_crop_flip

__all__ = ["Augment", "Pairs", "TensorBatches", "as_pair", "random_crop_flip", "require_repeatable", "set_epoch"]
