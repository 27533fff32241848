"""Lecture 8: a run that is stopped and resumed ends with the bits of the run that is not."""
import torch
from lecture8 import train


def test_resumed_run_is_the_straight_run(tmp_path):
    batches, path = torch.arange(640.0).sin().view(10, 16, 4), tmp_path / "run.pt"
    straight = train(batches, path)
    train(batches[:4], path)
    batches[:4] = torch.nan                              # a run that repeats one of these steps becomes nan
    resumed = train(batches, path, resume=True)
    for found, expected in zip(resumed, straight):
        assert torch.equal(found.weight, expected.weight), "the runs differ; nan: a step was repeated"
