"""Molecules as graphs: SMILES strings and rdkit molecules, with torch_geometric's atom and bond categories.

The columns are those of ``torch_geometric.utils.from_smiles``, a superset of OGB's (arXiv:2005.00687, appendix).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmrep.encoder import BadSampleError
from mmrep.registry import require

if TYPE_CHECKING:
    from PIL.Image import Image

ATOM_CATEGORIES = {
    "atomic_num": 119,
    "chirality": 9,
    "degree": 11,
    "formal_charge": 12,
    "num_hs": 9,
    "num_radical_electrons": 5,
    "hybridization": 8,
    "is_aromatic": 2,
    "is_in_ring": 2,
}
"""Integer columns of an atom, and how many values each has."""

BOND_CATEGORIES = {"bond_type": 22, "stereo": 6, "is_conjugated": 2}
"""Integer columns of a bond, and how many values each has."""


def is_molecule(raw: Any) -> bool:
    """Whether ``raw`` is a string (SMILES) or an rdkit molecule."""
    return isinstance(raw, str) or hasattr(raw, "GetAtoms")


def molecule(raw: Any, *, hydrogens: bool = False) -> dict[str, Any]:
    """A SMILES string or rdkit molecule to ``edge_index``, ``x`` int64 [n, 9] and ``edge_attr`` int64 [e, 3].

    Parts without a bond between them (salts) are one graph of several components.

    Args:
        raw: the molecule.
        hydrogens: hydrogens become nodes.

    Raises:
        BadSampleError: ``empty SMILES``, ``invalid SMILES``, or ``unusual molecule``: something that the categories
            have no value for, or a molecule that was never sanitised.
        MissingPackageError: rdkit or torch_geometric is not installed.
    """
    mol = _parse(raw)
    chem = require("rdkit.Chem", "molecules")
    smiles = require("torch_geometric.utils.smiles", "graph")
    with require("rdkit.rdBase", "molecules").BlockLogs():
        try:
            mol = chem.AddHs(mol) if hydrogens else mol
            data = smiles.from_rdmol(mol)
        except (ValueError, RuntimeError) as error:  # a value out of a category's list; properties never computed
            raise BadSampleError("unusual molecule", " ".join(str(error).split())[:200]) from error
    return {"edge_index": data.edge_index, "x": data.x, "edge_attr": data.edge_attr, "directed": False}


def draw(raw: Any) -> Image:
    """The usual drawing of a molecule, 300 x 300 pixels.

    Raises:
        BadSampleError: as `molecule`.
        MissingPackageError: rdkit is not installed.
    """
    mol = _parse(raw)
    with require("rdkit.rdBase", "molecules").BlockLogs():
        return require("rdkit.Chem.Draw", "molecules").MolToImage(mol, size=(300, 300))


def _parse(raw: Any) -> Any:
    if not isinstance(raw, str):
        return raw
    chem = require("rdkit.Chem", "molecules")
    if not raw.strip():
        raise BadSampleError("empty SMILES", repr(raw[:20]))
    lines = raw.strip().splitlines()
    with require("rdkit.rdBase", "molecules").BlockLogs():
        # Of several lines rdkit reads the first and says nothing.
        mol = chem.MolFromSmiles(lines[0]) if len(lines) == 1 else None
    if mol is None:
        raise BadSampleError("invalid SMILES", repr(raw[:200]))
    return mol
