"""Lecture 5: the network is told t and y, takes any batch, and learns."""
import pytest
import torch
from lecture5 import Mixer

from data import shapes
from diffusion import Diffusion

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T, Y = torch.arange(9) * 111, torch.arange(9)            # 9 timesteps; 8 classes and the null label


@pytest.fixture(scope="module")
def trained():
    """-> the network after 60 steps on one image of each class in pure noise, and its error over their variance."""
    torch.manual_seed(0)
    images, labels = map(torch.from_numpy, shapes(range(64), 16))
    images = images[labels].float() / 127.5 - 1
    model = Mixer(16, 3, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    diffusion = Diffusion(weighting="const")
    for _ in range(60):
        loss, _ = diffusion.loss(model, images, torch.full_like(labels, 999), torch.randn_like(images), labels)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return model.eval(), float(loss.mean() / images.var(0, correction=0).mean())


def test_it_learns_what_only_the_class_tells(trained):
    """From pure noise, a network without classes can at best draw the mean of all images: its error is 1."""
    assert trained[1] < 0.75, f"the error is {trained[1]:.2f}; without classes it is at least 1"


@pytest.mark.parametrize("t, y", [(T, T * 0), (T * 0, Y)], ids=["timestep", "label"])
def test_each_gets_an_output_of_its_own(trained, t, y):
    outputs = trained[0](X.expand(9, -1, -1, -1), t, y).flatten(1)
    assert torch.pdist(outputs).min() > 1e-3, "two outputs are equal for the same image"


def test_no_label_is_the_null_label_and_a_batch_is_its_images(trained):
    batch = trained[0](X.expand(9, -1, -1, -1), T)
    alone = trained[0](X, T[4:5], Y[8:])
    assert torch.allclose(batch[4:5], alone, atol=1e-5)
