"""Routers, balance losses and dispatch: what holds for every shape, checked on many; and what needs more than one process."""
import copy
import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import nn

from moe_lab.experts import ACTIVATIONS, Collect, FeedForwardExpert, MoELayer, Spread, assign, run_selected
from moe_lab.params import UserError
from moe_lab.routers import (CumulativeCountVariance, Routing, SelfAttentionRouter, TopKRouter, chance_information, decide, importance_variance,
                             kl_to_uniform, mutual_information, router_z_loss, routing_entropy, switch_balance_loss, usage_share)

def for_all(*strategies):
    "given, on forty examples that are the same in every run."
    return lambda test: settings(deadline=None, max_examples=40, derandomize=True, database=None)(given(*strategies)(test))


@st.composite
def problems(draw, min_tokens=0):
    "Number of tokens and experts, k, seed."
    experts = draw(st.integers(1, 6))
    return draw(st.integers(min_tokens, 12)), experts, draw(st.integers(1, experts)), draw(st.integers(0, 10_000))


class Counting(nn.Module):
    "An expert that counts what it processes; of another class, so that the layer treats it as any module."

    def __init__(self, expert):
        super().__init__()
        self.expert, self.count = expert, 0

    def forward(self, x):
        self.count += len(x)
        return self.expert(x)


def make_layer(experts, top_k, seed, dtype=torch.float64, counting=False, dim=5, activation="gelu"):
    torch.manual_seed(seed)
    layer = MoELayer(TopKRouter(dim, experts, top_k), [FeedForwardExpert(dim, 7, activation) for _ in range(experts)]).to(dtype)
    if counting: layer.experts = nn.ModuleList(Counting(expert) for expert in layer.experts)
    return layer


def naive(layer, x):
    "Token by token."
    routing = layer.router(x)
    rows = [sum(w * layer.experts[e](token) for w, e in zip(ws, es.tolist())) for token, ws, es in zip(x, routing.weights, routing.indices)]
    return torch.stack(rows) if rows else x


def everything(layer, x, function):
    "Values and all gradients; zeros where there is none."
    x = x.detach().requires_grad_()
    out = function(x)
    loss = out.sin().sum() if out.requires_grad else (x * 0).sum()
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads))]


# --- routers ------------------------------------------------------------------------------------------------------------------------

@for_all(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_decision_is_the_top_k_renormalised(problem, dtype):
    tokens, experts, top_k, seed = problem
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).to(dtype)
    routing = decide(logits, top_k)
    assert routing.probs.dtype == torch.promote_types(dtype, torch.float32) and routing.weights.shape == routing.indices.shape == (tokens, top_k)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(tokens, dtype=routing.probs.dtype))
    chosen = routing.probs.gather(-1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    assert all(len(set(row)) == top_k for row in routing.indices.tolist())
    left_out = torch.ones_like(routing.probs, dtype=torch.bool).scatter(-1, routing.indices, False)
    assert (routing.probs.masked_fill(~left_out, 0).amax(-1) <= chosen.amin(-1)).all() if tokens else True


def test_router_shapes_and_refusals():
    assert TopKRouter(8, 4)(torch.randn(2, 8, 5, 7)).weights.shape == (2, 2)
    assert TopKRouter(8, 4, None)(torch.randn(2, 3, 8)).weights.shape == (2, 3, 4)
    for k in (0, 5):
        with pytest.raises(UserError, match="top_k"): TopKRouter(8, 4, k)


@pytest.mark.parametrize("top_k", [None, 2])
def test_every_part_of_the_attention_router_learns(top_k):
    router = SelfAttentionRouter(4, top_k)
    routing = router(torch.rand(3, 3, 40, 64))
    assert routing.weights.shape == (3, top_k or 4)
    routing.weights.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in router.parameters()) >= len(list(router.parameters())) - 1  # a bias of all keys has no effect


def test_noise_acts_in_training_only():
    router, x = TopKRouter(8, 4, noise=1.0), torch.randn(6, 8)
    assert not torch.equal(router(x).logits, router(x).logits)
    assert torch.equal(router.eval()(x).logits, router(x).logits)


# --- balance ------------------------------------------------------------------------------------------------------------------------

@for_all(st.integers(2, 8), st.integers(1, 8), st.integers(1, 5))
def test_balance_is_one_at_uniform_and_e_at_collapse(experts, top_k, rounds):
    top_k = min(top_k, experts)
    indices = (torch.arange(experts * rounds)[:, None] + torch.arange(top_k)) % experts
    uniform = torch.full((len(indices), experts), 1 / experts, dtype=torch.float64)
    torch.testing.assert_close(usage_share(indices, experts).sum(), torch.tensor(1.))
    assert math.isclose(switch_balance_loss(uniform, indices), 1, rel_tol=1e-6)
    collapsed = torch.zeros_like(uniform).index_fill(1, torch.tensor(0), 1)
    assert switch_balance_loss(collapsed, torch.zeros(len(indices), 1, dtype=torch.int64)) == experts
    assert abs(kl_to_uniform(uniform)) < 1e-12 and math.isclose(kl_to_uniform(collapsed), math.log(experts))
    assert importance_variance(uniform) < 1e-12 and math.isclose(importance_variance(collapsed), 1 / experts)
    assert CumulativeCountVariance(experts)(collapsed.float()) == pytest.approx(1)


@for_all(problems(min_tokens=1))
def test_gradients_are_where_they_are_promised(problem):
    tokens, experts, top_k, seed = problem
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    routing = decide(logits, top_k)
    losses = dict(switch=switch_balance_loss(routing.probs, routing.indices), kl=kl_to_uniform(routing.probs), variance=importance_variance(routing.probs), z=router_z_loss(logits))
    size = {name: torch.autograd.grad(loss, logits, retain_graph=True)[0].abs().max() for name, loss in losses.items()}
    assert size["z"] > 0
    if experts > 1: assert size["kl"] > 0 and size["variance"] > 0
    if experts > top_k: assert size["switch"] > 0
    faulty = CumulativeCountVariance(experts)(routing.probs)
    assert torch.equal(torch.autograd.grad(faulty, logits)[0], torch.zeros_like(logits))


@for_all(problems(), st.randoms(use_true_random=False))
def test_losses_do_not_depend_on_order(problem, random):
    tokens, experts, top_k, seed = problem
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    items, names = random.sample(range(tokens), tokens), random.sample(range(experts), experts)
    for one, other in [(logits, logits[items]), (logits, logits[:, names])]:
        a, b = decide(one, top_k), decide(other, top_k)
        torch.testing.assert_close(switch_balance_loss(a.probs, a.indices), switch_balance_loss(b.probs, b.indices))
        for loss in (kl_to_uniform, importance_variance): torch.testing.assert_close(loss(a.probs), loss(b.probs))
        torch.testing.assert_close(usage_share(a.indices, experts).sort().values, usage_share(b.indices, experts).sort().values)


def test_nothing_routed_is_no_special_case():
    empty = decide(torch.zeros(0, 4, requires_grad=True), 2)
    losses = [switch_balance_loss(empty.probs, empty.indices), kl_to_uniform(empty.probs), importance_variance(empty.probs), router_z_loss(empty.logits), CumulativeCountVariance(4)(empty.probs)]
    assert all(loss == 0 for loss in losses) and routing_entropy(usage_share(empty.indices, 4)) == 0 and mutual_information([], []) == 0
    sum(losses).backward()


@for_all(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc")), min_size=1, max_size=60))
def test_mutual_information_is_what_entropies_say(pairs):
    entropy = lambda values: -sum(n / len(pairs) * math.log2(n / len(pairs)) for n in {v: values.count(v) for v in values}.values())
    choices, conditions = [a for a, _ in pairs], [b for _, b in pairs]
    bits = mutual_information(choices, conditions)
    assert bits == pytest.approx(entropy(choices) + entropy(conditions) - entropy(pairs), abs=1e-9)
    assert bits == pytest.approx(mutual_information(conditions, choices), abs=1e-12) and bits == mutual_information(torch.tensor(choices), conditions)
    assert chance_information(choices, conditions) >= 0


# --- dispatch -----------------------------------------------------------------------------------------------------------------------

@for_all(problems())
def test_assignment_keeps_every_slot(problem):
    tokens, experts, top_k, seed = problem
    indices = decide(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)), top_k).indices
    work = assign(indices, experts)
    seen = sorted((row, slot) for _, rows, slots in work for row, slot in zip(rows.tolist(), slots.tolist()))
    assert seen == [(row, slot) for row in range(tokens) for slot in range(top_k)]
    assert all((indices[rows, slots] == expert).all() and (rows.diff() > 0).all() and len(rows) == work.counts[expert] for expert, rows, slots in work)
    values = torch.randn(tokens, 3)
    torch.testing.assert_close(Collect.apply(Spread.apply(values, work.rows, work.places), work.rows, work.places), top_k * values)


@for_all(problems(), st.booleans(), st.sampled_from(sorted(ACTIVATIONS)))
def test_layer_equals_the_naive_loop(problem, counting, activation):
    tokens, experts, top_k, seed = problem
    layer = make_layer(experts, top_k, seed, counting=counting, activation=activation)
    x = torch.randn(tokens, 5, dtype=torch.float64)
    for ours, theirs in zip(everything(layer, x, layer), everything(layer, x, lambda x: naive(layer, x))): torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    assert sum(layer.counts) == tokens * top_k and layer.counts == torch.bincount(layer.routing.indices.flatten(), minlength=experts).tolist()


@pytest.mark.parametrize("part", ["", "up", "down"])
def test_a_forward_put_in_place_of_another_is_obeyed(part):
    """As adapters do (LoRA); and a linear layer without bias is an expert like any other."""
    layer = make_layer(3, 2, 1)
    x = torch.randn(6, 5, dtype=torch.float64)
    before = layer(x)
    patched = layer.experts[0].get_submodule(part)
    patched.forward = lambda value, usual=patched.forward: usual(value) + 1
    torch.testing.assert_close(layer(x), naive(layer, x))
    assert not torch.equal(layer(x), before)
    for expert in layer.experts: expert.up.bias = None
    torch.testing.assert_close(layer(x), naive(layer, x))


@for_all(problems(), st.sampled_from(sorted(ACTIVATIONS)))
def test_float32_is_within_a_millionth(problem, activation):
    tokens, experts, top_k, seed = problem
    layer = make_layer(experts, top_k, seed, torch.float32, activation=activation)
    x = torch.randn(tokens, 5)
    for ours, theirs in zip(everything(layer, x, layer), everything(layer, x, lambda x: naive(layer, x))): torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradcheck(counting, activation):
    layer = make_layer(3, 2, 1, counting=counting, activation=activation)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    names, leaves = zip(*layer.named_parameters())
    assert torch.autograd.gradcheck(lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p)), (x,)), (x, *leaves))


@for_all(problems())
def test_all_experts_equal_the_soft_sum(problem):
    tokens, experts, _, seed = problem
    layer, x = make_layer(experts, experts, seed), torch.randn(tokens, 5, dtype=torch.float64)
    chosen = everything(layer, x, layer)
    layer.router.top_k = None
    soft = everything(layer, x, layer)
    written = everything(layer, x, lambda x: sum(layer.router(x).probs[:, i, None] * expert(x) for i, expert in enumerate(layer.experts)))
    for a, b, c in zip(chosen, soft, written): torch.testing.assert_close(a, b), torch.testing.assert_close(b, c)


@for_all(problems(), st.randoms(use_true_random=False))
def test_order_of_tokens_and_experts_does_not_matter(problem, random):
    tokens, experts, top_k, seed = problem
    layer, x = make_layer(experts, top_k, seed), torch.randn(tokens, 5, dtype=torch.float64)
    items, names = random.sample(range(tokens), tokens), random.sample(range(experts), experts)
    torch.testing.assert_close(layer(x)[items], layer(x[items]))
    counts = layer.counts
    other = copy.deepcopy(layer)
    other.experts = nn.ModuleList(other.experts[i] for i in names)
    other.router.gate.weight.data, other.router.gate.bias.data = layer.router.gate.weight.data[names], layer.router.gate.bias.data[names]
    torch.testing.assert_close(other(x), layer(x))
    assert other.counts == [counts[i] for i in names]


@for_all(problems(min_tokens=1))
def test_experts_process_what_chose_them_and_nothing_else(problem):
    tokens, experts, top_k, seed = problem
    layer = make_layer(experts, top_k, seed, counting=True)
    layer(torch.randn(tokens, 5, dtype=torch.float64)).sum().backward()
    assert [expert.count for expert in layer.experts] == layer.counts
    for expert in layer.experts: assert all((p.grad is None) == (expert.count == 0) for p in expert.parameters())


@pytest.mark.parametrize("counting", [False, True])
def test_no_tokens_at_all(counting):
    layer = make_layer(4, 2, 0, counting=counting)
    x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (0, 5) and layer.counts == [0] * 4 and x.grad.shape == (0, 5)
    assert all(p.grad is None for p in layer.experts.parameters())


def test_whole_networks_as_experts():
    torch.manual_seed(0)
    networks = nn.ModuleList(Counting(nn.Conv2d(3, 4, 3)) for _ in range(4))
    images, indices = torch.randn(6, 3, 8, 8, requires_grad=True), torch.tensor([[0, 2], [2, 0], [0, 2], [2, 3], [3, 2], [0, 3]])
    parts = run_selected(networks, indices, images)
    assert [part.expert for part in parts] == [0, 2, 3] and [network.count for network in networks] == [4, 0, 5, 3]
    for part in parts:
        assert (indices[part.rows, part.slots] == part.expert).all()
        torch.testing.assert_close(part.output, networks[part.expert].expert(images[part.rows]))
    gradient, = torch.autograd.grad(sum(part.output.sum() for part in parts), images)
    expected, = torch.autograd.grad(sum(networks[e].expert(images[i:i + 1]).sum() for i in range(6) for e in indices[i].tolist()), images)
    torch.testing.assert_close(gradient, expected)
    assert run_selected(networks, indices[:0], images[:0]) == []


# --- numbers ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counting", [False, True])
def test_two_runs_give_the_same_bits(counting):
    def run():
        layer = make_layer(4, 2, 3, torch.float32, counting, dim=64)
        return everything(layer, torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), layer)

    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try: assert all(torch.equal(a, b) for a, b in zip(run(), run()))
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("counting", [False, True])
def test_bfloat16_autocast(counting):
    layer = make_layer(4, 2, 3, torch.float32, counting, dim=32)
    x = torch.randn(200, 32)
    exact = everything(layer, x, layer)
    with torch.autocast("cpu", torch.bfloat16): reduced = everything(layer, x, layer)
    assert layer.routing.probs.dtype == torch.float32 and reduced[0].dtype == torch.float32
    assert not torch.equal(exact[0], reduced[0]), "nothing was computed in bfloat16"
    for a, b in zip(exact, reduced): assert a.dtype == b.dtype and (a - b).norm() < 0.02 * a.norm()


def test_a_model_in_bfloat16():
    layer = make_layer(4, 2, 3, torch.bfloat16, dim=32)
    out = layer(torch.randn(50, 32, dtype=torch.bfloat16, requires_grad=True))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and layer.router.gate.weight.grad.dtype == torch.bfloat16 and layer.routing.probs.dtype == torch.float32


def test_compiled_model_computes_the_same():
    layer = make_layer(4, 2, 3, torch.float32)
    x = torch.randn(30, 5)
    compiled = torch.compile(layer, backend="aot_eager")
    for a, b in zip(everything(layer, x, compiled), everything(layer, x, layer)): torch.testing.assert_close(a, b)


def test_a_layer_survives_copying_after_use():
    layer = make_layer(4, 2, 0)
    out = layer(torch.randn(3, 5, dtype=torch.float64))
    other = copy.deepcopy(layer)
    assert isinstance(layer.routing, Routing) and other.routing is None and out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values()))


# --- several processes --------------------------------------------------------------------------------------------------------------

def gradients_in_parallel(counting, rank):
    "Three steps of two processes; each prefers an expert of its own, and the other two are idle everywhere."
    layer = make_layer(4, 1, 0, torch.float32, counting)
    parallel = nn.parallel.DistributedDataParallel(layer)
    chosen = decide(nn.functional.one_hot(torch.full((6,), rank), 4).float(), 1)
    for tokens in (6, 6, 6 * rank):  # in the last step, one process has no token
        parallel.zero_grad()
        routing = Routing(chosen.weights[:tokens], chosen.indices[:tokens], chosen.probs[:tokens], chosen.logits[:tokens])
        x = torch.ones(tokens, 5, requires_grad=True)
        (parallel(x, routing).sum() + 0 * sum(p.sum() for p in layer.router.parameters())).backward()
    return [p.grad for p in layer.experts.parameters()]


def train_in_parallel(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save([gradients_in_parallel(counting, rank) for counting in (False, True)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_idle_experts_do_not_stop_data_parallel_training(tmp_path):
    "For feed-forward experts (False) and for any others (True); find_unused_parameters is off."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(train_in_parallel, (port, str(tmp_path)), nprocs=2)
    for first, second in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))):
        assert all(torch.equal(a, b) for a, b in zip(first, second)), "both processes must have the mean gradient"
        assert [any(g.abs().sum() > 0 for g in first[4 * e:4 * e + 4]) for e in range(4)] == [False, True, False, False]
