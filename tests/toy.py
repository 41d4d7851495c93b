"""Small models, batches and settings that the trainer's tests share."""

from p3b.data import Data, DataConfig, create_data


def read_data(source, *, rank=0, world=1, **settings) -> Data:
    """The data of a DataConfig, as process `rank` of `world` reads it."""
    data = create_data(DataConfig(source, **settings))
    return data if (rank, world) == (0, 1) else data.part(rank, world)
