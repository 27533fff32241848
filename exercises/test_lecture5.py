"""Lecture 5: the network is told t and y, takes any batch, and learns."""
import torch
from lecture5 import Mixer

from data import shapes


def test_network_is_told_t_and_y_and_learns():
    """It learns one image of each class from pure noise. Without y the best it can draw is their mean."""
    torch.manual_seed(0)
    torch.set_num_threads(1)                             # faster, for matrices this small
    images, labels = map(torch.from_numpy, shapes(range(8), 16))
    x0 = images / 127.5 - 1
    last = torch.full_like(labels, 999)
    model = Mixer(16, 3, 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        error = (model(torch.randn_like(x0), last, labels) - x0).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.75 * x0.var(0, correction=0).mean(), "it has not learned what only y tells"
    model.eval()
    labels = torch.tensor([*range(9), 8])                # each class, and the null label twice, once at t = 0
    times = torch.tensor([999] * 9 + [0])
    outputs = model(x0[[0] * 10], times, labels).flatten(1)
    assert torch.pdist(outputs).min() > 0.001, "t, a class or the null label changes nothing"
    null, alone = model(x0, last, last * 0 + 8), model(x0[:1], last[:1])
    assert torch.allclose(null[:1], alone, atol=1e-5), "no y is not the null label, or the batch matters"
