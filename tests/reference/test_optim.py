"""The optimiser: orthogonal updates, and who gets which parameters."""

import torch
from torch import nn

from vispress.reference.train.optim import make_optimizer, orthogonalise


def test_newton_schulz_brings_singular_values_near_one():
    stack = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for x in (stack, stack.mT):
        values = torch.linalg.svdvals(orthogonalise(x))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_torch_muon_gives_the_same_step():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
    theirs.load_state_dict(ours.state_dict())
    mine = make_optimizer({"m": ours}, lr=0.01)
    other = torch.optim.Muon(
        theirs.parameters(), lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for layer, optimizer in ((ours, mine), (theirs, other)):
            layer(torch.ones(2, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=2e-3, rtol=0)


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.embed = nn.Embedding(5, 4)

    optimizer = make_optimizer({"a": Both()}, lr=1.0, scales={"a": 0.5})
    shapes = {g["muon"]: [tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups}
    assert shapes == {True: [(4, 4)], False: [(4,), (5, 4)]}
    assert all(g["lr_scale"] == 0.5 for g in optimizer.param_groups)


def test_a_module_without_gradients_stays_as_it_is(monkeypatch):
    modules = {"still": nn.Linear(4, 4), "moving": nn.Linear(4, 4)}
    optimizer = make_optimizer(modules, lr=0.1)
    before = [p.detach().clone() for p in modules["still"].parameters()]
    modules["moving"](torch.ones(2, 4)).sum().backward()

    def nothing_to_share(stacks, work):
        # several processes exchange no empty lists
        assert stacks
        return [work(stack) for stack in stacks]

    monkeypatch.setattr("vispress.reference.train.optim.shared", nothing_to_share)
    moved = modules["moving"].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(modules["moving"].weight, moved)
    after = list(modules["still"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
