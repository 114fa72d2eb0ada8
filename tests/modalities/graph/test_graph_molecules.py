"""SMILES and rdkit molecules become torch_geometric's graphs."""

from __future__ import annotations

import pytest
import torch
from rdkit import Chem, RDLogger
from torch_geometric.utils import from_smiles
from torch_geometric.utils.smiles import e_map, x_map

from mmrep import BadSampleError
from mmrep.config import component
from mmrep.modalities.graph.molecules import ATOM_CATEGORIES, BOND_CATEGORIES
from mmrep.modalities.graph.read import Reading, read

CAFFEINE = "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"
MOLECULE = Reading(input="molecule")


def test_the_categories_are_those_of_torch_geometric():
    assert {name: len(values) for name, values in x_map.items()} == ATOM_CATEGORIES
    assert {name: len(values) for name, values in e_map.items()} == BOND_CATEGORIES
    assert list(ATOM_CATEGORIES) == list(x_map)
    assert list(BOND_CATEGORIES) == list(e_map)


@pytest.mark.parametrize("hydrogens", [False, True])
@pytest.mark.parametrize("smiles", [CAFFEINE, "C/C=C\\Cl", "[Na+].[Cl-]", "N[C@@H](C)C(=O)O", "[2H]C"])
def test_a_smiles_string_is_read_as_torch_geometric_reads_it(smiles: str, hydrogens: bool):
    data = from_smiles(smiles, with_hydrogen=hydrogens)
    how = Reading(input="molecule", hydrogens=hydrogens)
    molecule = Chem.MolFromSmiles(smiles)
    for raw in (
        smiles,
        f" {smiles}\n",
        molecule,
        data,
        {"edge_index": data.edge_index, "x": data.x, "edge_attr": data.edge_attr},
    ):
        graph = read(raw, how)
        assert graph.categories.tolist() == data.x.tolist()
        want = {(i, j): tuple(f) for i, j, f in zip(*data.edge_index.tolist(), data.edge_attr.tolist(), strict=True)}
        got = [(i, j) for i, j in graph.edges.tolist()]
        assert len(got) == len(want)
        assert {way: tuple(f) for way, f in zip(got, graph.edge_categories.tolist(), strict=True)} == want


def test_one_atom_is_a_graph_and_a_salt_is_one_of_two_parts():
    assert len(read("C", MOLECULE)) == 1
    salt = read("[Na+].[Cl-]", MOLECULE)
    assert len(salt) == 2
    assert len(salt.edges) == 0


@pytest.mark.parametrize(("raw", "cause"), [
    ("C1CC", "invalid SMILES"), ("not a molecule", "invalid SMILES"), ("CC\nCCO", "invalid SMILES"),
    ("C\x00C", "invalid SMILES"), ("C(C)(C)(C)(C)C", "invalid SMILES"), ("", "empty SMILES"), (" \n", "empty SMILES"),
    ("[Fe+9]", "unusual molecule"), (Chem.Mol(), "no nodes"),
    (Chem.MolFromSmiles("CCO", sanitize=False), "unusual molecule"),
    ("C" * 10_001, "too many nodes"),
])  # fmt: skip
def test_what_is_no_molecule_is_a_bad_sample_and_rdkit_says_nothing(raw, cause: str, capfd):
    with pytest.raises(BadSampleError) as caught:
        read(raw, MOLECULE)
    assert caught.value.cause == cause
    assert capfd.readouterr() == ("", "")


def test_the_log_of_rdkit_is_silenced_for_a_while_only(capfd):
    RDLogger.EnableLog("rdApp.*")  # torch_geometric's from_smiles, used above, turns it off for good
    with pytest.raises(BadSampleError):
        read("C1CC", MOLECULE)
    assert capfd.readouterr().err == ""
    Chem.MolFromSmiles("C1CC")
    assert "unclosed ring" in capfd.readouterr().err


def test_a_molecule_is_shown_as_a_drawing_and_a_graph_as_a_line():
    encoder = component("encoders", "graph-gnn", input="molecule", width=8, depth=1).build()
    assert encoder.preview(CAFFEINE).size == (300, 300)
    assert encoder.preview(Chem.MolFromSmiles(CAFFEINE)).size == (300, 300)
    assert encoder.preview(from_smiles(CAFFEINE)) == "graph of 14 nodes, 15 edges"
    assert encoder.preview("C1CC").startswith("invalid SMILES")
    plain = component("encoders", "graph-gnn", directed="both", width=8, depth=1).build()
    assert plain.preview({"edges": [(0, 1)], "directed": True}) == "directed graph of 2 nodes, 1 edge"
    assert plain.preview({"edges": [], "num_nodes": 1}) == "graph of 1 node, 0 edges"


def test_bonds_and_atoms_change_the_result():
    torch.manual_seed(0)
    encoder = component("encoders", "graph-gnn", input="molecule", width=16, depth=2).build().eval()

    def pooled(smiles: str) -> torch.Tensor:
        return encoder(encoder.collate([encoder.prepare(smiles)])).tokens.values.mean((0, 1))

    torch.testing.assert_close(pooled("CCO"), pooled("OCC"))
    assert (pooled("CCO") - pooled("CCN")).abs().max() > 1e-3
    assert (pooled("CC#N") - pooled("CC=N")).abs().max() > 1e-3
