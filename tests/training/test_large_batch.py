from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.memory_log import MemoryLog
from tests.training.small_job import model, run, seats, site
from training.large_batch import Lamb, Lars, scaled_rate, warm_up


def matrix_and_bias() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return nn.Parameter(torch.randn(5, 4, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(5, 4, generator=generator), torch.randn(5, generator=generator)


def test_lamb_is_algorithm_2_of_its_paper() -> None:
    weight, bias = matrix_and_bias()
    optimizer = Lamb([weight, bias], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02)
    w, b = weight.detach().double().numpy().copy(), bias.detach().double().numpy().copy()
    moments = [np.zeros_like(w), np.zeros_like(w), np.zeros_like(b), np.zeros_like(b)]
    for step in range(1, 6):
        weight.grad, bias.grad = gradients(step)
        optimizer.step()
        for value, gradient, place in ((w, weight.grad, 0), (b, bias.grad, 2)):
            g = gradient.double().numpy()
            moments[place] = 0.8 * moments[place] + 0.2 * g
            moments[place + 1] = 0.95 * moments[place + 1] + 0.05 * g * g
            r = moments[place] / (1 - 0.8**step) / (np.sqrt(moments[place + 1] / (1 - 0.95**step)) + 1e-6)
            if value.ndim == 2:
                r = r + 0.02 * value
                r *= np.linalg.norm(value) / np.linalg.norm(r)
            np.subtract(value, 0.1 * r, out=value)
    assert np.allclose(weight.detach().numpy(), w, atol=1e-5)
    assert np.allclose(bias.detach().numpy(), b, atol=1e-5)


def test_lars_is_algorithm_1_of_its_paper() -> None:
    weight, bias = matrix_and_bias()
    optimizer = Lars([weight, bias], lr=0.5, momentum=0.8, weight_decay=0.01, coefficient=0.1)
    w, b = weight.detach().double().numpy().copy(), bias.detach().double().numpy().copy()
    velocity_w, velocity_b = np.zeros_like(w), np.zeros_like(b)
    for step in range(1, 6):
        weight.grad, bias.grad = gradients(step)
        optimizer.step()
        g = weight.grad.double().numpy()
        trust = 0.1 * np.linalg.norm(w) / (np.linalg.norm(g) + 0.01 * np.linalg.norm(w))
        velocity_w = 0.8 * velocity_w + 0.5 * trust * (g + 0.01 * w)
        velocity_b = 0.8 * velocity_b + 0.5 * bias.grad.double().numpy()
        w, b = w - velocity_w, b - velocity_b
    assert np.allclose(weight.detach().numpy(), w, atol=1e-5)
    assert np.allclose(bias.detach().numpy(), b, atol=1e-5)


def test_a_tensor_of_zeros_still_moves() -> None:
    for make in (lambda each: Lamb(each, lr=0.1), lambda each: Lars(each, lr=0.1)):
        weight = nn.Parameter(torch.zeros(3, 3))
        weight.grad = torch.ones(3, 3)
        make([weight]).step()
        assert torch.isfinite(weight).all()
        assert (weight != 0).all()


def test_the_rate_rises_over_the_first_steps_and_goes_on_after_a_checkpoint() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=scaled_rate(0.1, batch=1024, base_batch=256))
    warm_up(optimizer, steps=4)
    rates = []
    for _ in range(3):
        weight.grad = torch.ones(2)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    saved = optimizer.state_dict()
    again = torch.optim.SGD([weight], lr=0.4)
    warm_up(again, steps=4)
    again.load_state_dict(saved)
    for _ in range(2):
        weight.grad = torch.ones(2)
        again.step()
        rates.append(again.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
    "make", [lambda m: Lamb(m.parameters(), lr=0.05), lambda m: Lars(m.parameters(), lr=0.2, coefficient=0.1)]
)
def test_sites_train_with_them_and_a_checkpoint_holds_their_state(tmp_path: Path, make: object) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    sites = [site(log, tmp_path, name, samples=960, outer_momentum=0.5) for name in ("ams", "oslo")]
    for each in sites:
        each.optimizer = make  # type: ignore[assignment]
    run(*sites)
    assert sites[0].losses is not None
    assert np.mean(sites[0].losses[-10:]) < 0.7 * np.mean(sites[0].losses[:10])
    newest = max((tmp_path / "ams/checkpoint").glob("round-*.safetensors"))
    fresh = MemoryLog(seats("ams"), base_round=60, base_hash=log.sealed[60].manifest_hash)
    resumed = site(fresh, tmp_path, "ams", samples=960, outer_momentum=0.5, resume_from=str(newest))
    resumed.optimizer, resumed.module = make, model()  # type: ignore[assignment]
    resumed.run()
    assert resumed.error is None
