"""Subgraph masks: connected where the graph allows it, exact in size, no matter how edges are given."""

from __future__ import annotations

import networkx as nx
import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.tokens import Grid, indicator

GROW = ("breadth", "walk")


def graphs(parts, draws=1, pad=0):
    """The graphs ``parts`` as one batch, each ``draws`` times; every edge is there once, in one direction."""
    n = max(len(part) for part in parts) + pad
    valid = torch.arange(n) < torch.tensor([len(part) for part in parts])[:, None]
    edges = [(i * n + a, i * n + b) for i, part in enumerate(parts) for a, b in part.edges]
    index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    return Grid(torch.zeros(len(parts), n, 1), valid, torch.zeros_like(valid), edges=index).repeat(draws)


def spared(graph, target):
    """The nodes that were in no target of a sample."""
    return set(graph) - {node for group in target for node in group if node >= 0}


@pytest.mark.parametrize("grow", GROW)
def test_a_target_is_connected_but_for_the_spared_node(grow):
    graph = nx.random_labeled_tree(24, seed=3)
    masker = component("masks", "subgraph", grow=grow, targets=2).build()
    target = masker(graphs([graph], 60), torch.arange(60)).target.tolist()
    whole = 0
    for sample in target:
        left = spared(graph, sample)
        for group in sample:
            assert len(set(group)) == 6
            assert any(nx.is_connected(graph.subgraph({*group, *more})) for more in [(), *([node] for node in left)])
            whole += nx.is_connected(graph.subgraph(group))
    assert whole > 90  # of 120: seldom does the spared node lie in between


def test_breadth_takes_the_nearest():
    """On a path a target of one group is an interval around its start; a tree's distances say how far it goes."""
    graph = nx.balanced_tree(2, 4)
    distance = dict(nx.all_pairs_shortest_path_length(graph))
    masker = component("masks", "subgraph", targets=1, ratio=0.3).build()
    for (group,) in masker(graphs([graph], 60), torch.arange(60)).target.tolist():
        out = set(graph) - set(group)
        # From some start in it, all but one of the nodes outside (the spared one) are as far as the farthest inside.
        assert any(
            sum(distance[start][node] < max(distance[start][k] for k in group) for node in out) <= 1 for start in group
        )


def test_walks_differ_from_breadth():
    """Along a long comb a walk reaches farther than a ball of the same size does."""
    graph = nx.grid_2d_graph(12, 12)
    graph = nx.convert_node_labels_to_integers(graph)
    distance = dict(nx.all_pairs_shortest_path_length(graph))
    spread = {}
    for grow in GROW:
        masker = component("masks", "subgraph", targets=1, ratio=0.15, grow=grow).build()
        groups = masker(graphs([graph], 40), torch.arange(40)).target[:, 0].tolist()
        spread[grow] = sum(max(distance[a][b] for a in group for b in group) for group in groups) / 40
    assert spread["walk"] > spread["breadth"] + 1


@pytest.mark.parametrize("grow", GROW)
def test_a_part_that_is_too_small_is_filled_from_elsewhere(grow):
    """Triangles: a target of 5 of 12 nodes holds one triangle (less the spared node) and others from the rest."""
    graph = nx.disjoint_union_all([nx.complete_graph(3)] * 4)
    masker = component("masks", "subgraph", targets=1, ratio=5 / 12, grow=grow).build()
    mask = masker(graphs([graph], 200), torch.arange(200))
    assert set(mask.counts("target").flatten().tolist()) == {5}
    for (group,) in mask.target.tolist():
        held = [len(set(group) & {3 * k, 3 * k + 1, 3 * k + 2}) for k in range(4)]
        assert max(held) >= 2
    assert bool(indicator(mask.target[:, 0], 12).any(0).all())


@pytest.mark.parametrize("grow", GROW)
def test_direction_order_and_repeats_of_edges_do_not_matter(grow):
    graph, seeds = nx.gnm_random_graph(15, 20, seed=1), torch.arange(30)
    grid = graphs([graph], 30)
    assert grid.edges is not None
    masker = component("masks", "subgraph", grow=grow).build()
    plain = masker(grid, seeds)
    both = torch.cat([grid.edges, grid.edges.flip(0)], 1)
    mixed = both[:, torch.randperm(both.shape[1], generator=torch.Generator().manual_seed(0))]
    for edges in (grid.edges.flip(0), mixed):
        mask = masker(Grid(grid.coords, grid.valid, grid.special, edges=edges), seeds)
        assert torch.equal(mask.target, plain.target)


@pytest.mark.parametrize("grow", GROW)
def test_edges_of_one_graph_do_not_reach_another(grow):
    """A star in a batch with a path, in padding of another length: the same as alone."""
    parts = [nx.star_graph(9), nx.path_graph(17), nx.empty_graph(4)]
    masker, seeds = component("masks", "subgraph", grow=grow).build(), torch.tensor([5, 6, 7])
    together = masker(graphs(parts, pad=3), seeds)
    for i, part in enumerate(parts):
        alone = masker(graphs([part]), seeds[i : i + 1]).target[0].tolist()
        here = [[node for node in group if node >= 0] for group in together.target[i].tolist()]
        assert here == alone


def test_padding_and_special_nodes_are_not_walked_through():
    """A master node that joins all is special: without it the two halves are apart."""
    graph = nx.disjoint_union(nx.path_graph(6), nx.path_graph(6))
    grid = graphs([graph], 50, pad=1)
    assert grid.edges is not None
    n = grid.valid.shape[1]
    special = torch.zeros_like(grid.valid)
    special[:, -1] = True
    hub = torch.tensor([(i * n + n - 1, i * n + node) for i in range(50) for node in range(12)]).T
    grid = Grid(grid.coords, grid.valid | special, special, edges=torch.cat([grid.edges, hub], 1))
    masker = component("masks", "subgraph", targets=1, ratio=0.25).build()
    for (group,) in masker(grid, torch.arange(50)).target.tolist():
        assert len({node // 6 for node in group}) == 1
        assert n - 1 not in group


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="grow"):
        component("masks", "subgraph", grow="depth")
