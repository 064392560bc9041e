import pytest
import torch

from deploypipe.data import TensorBatches, random_crop_flip
from deploypipe.errors import DataError
from deploypipe.split_fingerprints import fingerprint
from deploypipe.task import Splits


def images(count: int) -> torch.Tensor:
    return torch.arange(count * 3 * 6 * 5, dtype=torch.float32).reshape(count, 3, 6, 5) + 1


def batches(count: int, **options: object) -> TensorBatches:
    return TensorBatches(images(count), torch.arange(count), 4, **options)  # type: ignore[arg-type]


def labels(split: TensorBatches) -> list[int]:
    return [int(label) for _, target in split for label in target]


def test_plain_batches_are_the_data_in_order_every_time() -> None:
    split = batches(10)
    assert len(split) == 3 == len(list(split))
    assert labels(split) == labels(split) == list(range(10))
    assert torch.equal(torch.cat([x for x, _ in split]), images(10))


def test_order_follows_from_seed_and_epoch_alone() -> None:
    split = batches(50, shuffle=True)
    first = labels(split)
    torch.rand(7)
    assert labels(split) == first and sorted(first) == list(range(50))
    split.set_epoch(1)
    second = labels(split)
    split.set_epoch(0)
    assert second != first and labels(split) == first
    assert labels(batches(50, shuffle=True, seed=1)) not in (first, second)


def test_unequal_lengths_and_no_batch_are_refused() -> None:
    with pytest.raises(DataError, match="3 inputs but 2 targets"):
        TensorBatches(torch.zeros(3), torch.zeros(2), 1)
    with pytest.raises(DataError, match="batch_size must be >= 1, got 0"):
        TensorBatches(torch.zeros(3), torch.zeros(3), 0)


@pytest.mark.parametrize("flip", [True, False])
def test_each_augmented_image_is_a_crop_of_the_padded_one(flip: bool) -> None:
    source = images(40)
    result = random_crop_flip(2, flip=flip)(source, torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(source, (2, 2, 2, 2))
    num_mirrored = 0
    for i in range(len(source)):
        crops = [padded[i, :, t : t + 6, k : k + 5] for t in range(5) for k in range(5)]
        is_plain = any(torch.equal(result[i], crop) for crop in crops)
        is_mirrored = any(torch.equal(result[i], crop.flip(2)) for crop in crops)
        assert is_plain or is_mirrored
        num_mirrored += is_mirrored
    assert (5 < num_mirrored < 35) if flip else num_mirrored == 0


def splits(calib: object = None, val: object = None, test: object = None, train: object = None) -> Splits:
    return Splits(
        calib=calib or batches(8),  # type: ignore[arg-type]
        train=train or batches(8, shuffle=True),  # type: ignore[arg-type]
        val=val or batches(8),  # type: ignore[arg-type]
        test=test or batches(8),  # type: ignore[arg-type]
    )


def test_fingerprint_sees_data_labels_and_lengths() -> None:
    base = fingerprint(splits())
    assert base == fingerprint(splits())
    relabelled = TensorBatches(images(8), torch.zeros(8, dtype=torch.int64), 4)
    changed_late = images(8)
    changed_late[-1, -1, -1, -1] += 1
    others = [
        fingerprint(splits(calib=relabelled)),
        fingerprint(splits(val=relabelled)),
        fingerprint(splits(test=relabelled)),
        fingerprint(splits(calib=TensorBatches(changed_late, torch.arange(8), 4))),
        fingerprint(splits(train=batches(12))),
        fingerprint(splits(test=batches(12))),
    ]
    assert len({base, *others}) == 7


def test_fingerprint_takes_any_packing_and_leaves_the_global_generator() -> None:
    packed = [({"a": torch.zeros(2, 3), "b": torch.ones(2)}, (torch.zeros(2), torch.ones(2)))]

    class Restless:
        def __iter__(self):  # type: ignore[no-untyped-def]
            torch.rand(1)
            return iter(packed)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    fingerprint(splits(calib=Restless()))
    assert torch.equal(before, torch.get_rng_state())
