"""Lecture 8: a run that was stopped and resumed ends with the bits of the run that was not."""
import lecture8
import pytest
import torch


@pytest.mark.parametrize("stops", [[1, 10], [4, 10], [4, 7, 10]])
def test_resumed_run_is_the_straight_run(stops, tmp_path, monkeypatch):
    batch, drawn = lecture8.batch, []
    straight = lecture8.train(10, tmp_path / "straight.pt")
    monkeypatch.setattr(lecture8, "batch", lambda step: drawn.append(step) or batch(step))
    for stop in stops:
        resumed = lecture8.train(stop, tmp_path / "run.pt", resume=stop > stops[0])
    assert drawn == list(range(10)), "the steps that were done, in this order"
    assert torch.equal(resumed[0].weight, straight[0].weight), "the weights differ"
    assert torch.equal(resumed[1].weight, straight[1].weight), "the moving averages differ"
