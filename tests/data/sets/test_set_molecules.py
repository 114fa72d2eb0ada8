"""Molecules: which are kept, what they are called, and a split that no near-duplicate crosses."""

from __future__ import annotations

import time

import pytest
from set_fakes import files

from mmrep.config import ConfigError, component
from mmrep.data.sets import molecules as module
from mmrep.data.sets._uses import use_of
from mmrep.data.sets.molecules import Molecules, MoleculesConfig, _heavy_atoms, _scaffold


def line(cid, smiles, key, formula, iupac, common, *synonyms, cas=""):
    weight = "12.5" if formula else "n/a"
    return "\t".join([str(cid), cas or f"{cid}-00-0", formula, weight, smiles, "inchi", key, iupac, common, *synonyms])


@pytest.fixture
def package(tmp_path):
    small = [
        line(1, "CCO", "LFQSCWFLJHTTHZ-UHFFFAOYSA-N", "C2H6O", "ethanol", "alcohol", "grain alcohol", "64-17-5",
             "alcohol", "ethyl alcohol", "spirit", "(etoh)"),
        line(2, "c1ccccc1Br", "QARVLSVVCXYDNA-UHFFFAOYSA-N", "C6H5Br", "bromobenzene", "bromobenzene"),
        line(3, "CC(=O)[O-].[Na+]", "VMHLLURERBWHNL-UHFFFAOYSA-M", "C2H3NaO2", "sodium acetate", "plasmafusin"),
        line(4, "C1=CC=C(C=C1)N2CCCC2", "VDQQJMHXZCMNMU-UHFFFAOYSA-N", "C10H13N", "1-phenylpyrrolidine", "n2"),
        "5\ttoo\tshort",
        line(6, "not a molecule", "", "", "x", "nonsense"),
    ]  # fmt: skip
    large = [
        line(7, "C[C@H](N)O", "AAAAAAAAAAAAAA-ABCDEFGHIJ-N", "C2H7NO", "(1S)-1-aminoethanol", "aldehyde ammonia"),
        line(8, "CC(N)O", "AAAAAAAAAAAAAA-UHFFFAOYSA-N", "C2H7NO", "1-aminoethanol", "acetaldehyde ammonia"),
        line(9, "c1ccccc1I", "SNHMUERNLJLMHN-UHFFFAOYSA-N", "C6H5I", "iodobenzene", "phenyl iodide"),
    ]
    return files(tmp_path / "chemicals", {
        "Identifiers/chemical identifiers pubchem small.tsv": "\n".join(small) + "\n",
        "Identifiers/chemical identifiers pubchem large.tsv": "\n".join(large) + "\n",
        "Phase Change/Yaws Boiling Points.tsv": "CAS\tTb\n1-00-0\t351.39\n9-00-0\t\n",
        "Phase Change/OpenNotebook Melting Points.tsv": "CAS\tTm\n1-00-0\t101\n2-00-0\t102\n7-00-0\t107\n9-00-0\t109\n",
    })  # fmt: skip


def build(package, **fields):
    return component("sources", "molecules", root=str(package), **{"split": "all", **fields}).build()


def test_a_row_is_a_molecule(package):
    source = build(package, synonyms=2)
    rows = {source[i].id: source[i] for i in range(len(source))}
    assert rows["LFQSCWFLJHTTHZ"].fields == {
        "smiles": "CCO", "name": ["alcohol", "grain alcohol", "ethyl alcohol"], "common": "alcohol",
        "iupac": "ethanol", "formula": "C2H6O", "molecular_weight": 12.5, "boiling_point": 351.39,
        "melting_point": 101.0, "heavy_atoms": 3, "cas": "1-00-0",
    }  # fmt: skip
    assert rows["LFQSCWFLJHTTHZ"].group == "alcohol"
    assert set(rows["not a molecule"].fields) == {"smiles", "name", "common", "iupac", "heavy_atoms", "cas"}
    assert source._ids == sorted(source._ids)
    assert source.column("boiling_point").count(None) == len(source) - 1


def test_which_molecules_there_are(package):
    def ids(**fields):
        return set(build(package, **fields).column("cas"))

    words = {"1-00-0", "6-00-0", "7-00-0", "9-00-0"}
    assert ids() == words  # "bromobenzene" is the IUPAC name itself, "n2" has a digit, 3 a counter-ion, 8 is 7 again
    assert ids(salts=True) == words | {"3-00-0"}
    assert ids(names="common") == words | {"2-00-0", "4-00-0"}
    assert ids(max_heavy_atoms=4) == {"1-00-0", "6-00-0", "7-00-0"}
    assert build(package, names="iupac").column("name")[0] == ["(1S)-1-aminoethanol"]


def test_a_property_is_binned_by_the_quantiles_of_the_training_part(package, monkeypatch):
    # 1, 7 and 9 melt at 101, 107 and 109; 2 and 9 are benzene's, which always trains, and 1 is held out here.
    monkeypatch.setattr(module, "_part", lambda scaffold, config: "test" if scaffold == "CCC" else "train")

    def bins(**fields):
        source = build(package, names="common", property="melting_point", label="property_bin", **fields)
        assert [source[i].label for i in range(len(source))] == source.column("property_bin")
        return dict(zip(source.column("cas"), source.column("property_bin"), strict=True))

    pytest.importorskip("rdkit")
    everything = {"1-00-0": 0, "2-00-0": 0, "7-00-0": 1, "9-00-0": 2}  # cut at 103.67 and 107.67
    assert bins() == everything
    assert bins(split="test") == {"1-00-0": 0}
    assert bins(split="train", bins=2) == {"2-00-0": 0, "7-00-0": 1, "9-00-0": 1}  # cut at 107
    with pytest.raises(ConfigError, match="which has no boiling_point"):
        build(package, property="boiling_point", split="test")
    with pytest.raises(ConfigError, match="name one: property: melting_point"):
        build(package, label="property_bin")


def test_a_use_is_what_the_stem_of_the_name_says(package):
    uses = {
        "diazepam": "benzodiazepine", "propranolol": "beta blocker", "cefalexin": "cephalosporin", "monuron": "urea",
        "fenitrothion": "organophosphate", "sulfadiazine": "sulfonamide", "perazine": "phenothiazine",
    }  # fmt: skip
    assert {name: use_of(name) for name in uses} == uses
    # A stem by chance, a part of another stem, no stem, no single word.
    assert {use_of(name) for name in ("stanozolol", "homopiperazine", "toluene", "methyl parathion", None)} == {None}
    with pytest.raises(ConfigError, match="no molecule falls in"):
        build(package, property="use")  # nobody's
    identifiers = package / "Identifiers/chemical identifiers pubchem large.tsv"
    row = line(7, "CNC(=O)Oc1ccccc1", "B-C", "C8H9NO2", "phenyl methylcarbamate", "examplecarb")
    identifiers.write_text(f"{row}\n")
    known = build(package, property="use", label="use")
    assert [known[i].label for i in range(len(known))] == ["carbamate"]
    assert known.column("property_bin") == [None]
    with pytest.raises(ConfigError, match="name one: property: melting_point"):
        build(package, property="use", label="property_bin")


def test_a_limit_is_a_fixed_choice_of_its_own(package):
    some = build(package, limit=2)
    assert len(some) == 2
    assert set(some._ids) < set(build(package, limit=3)._ids)
    assert {tuple(build(package, limit=2, seed=seed)._ids) for seed in range(8)} != {tuple(some._ids)}


def test_heavy_atoms_of_a_formula():
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import CalcMolFormula

    for smiles in ("CCO", "c1ccccc1Br", "CC(=O)[O-].[Na+]", "[2H]C", "[H][H]", "OS(=O)(=O)O", "C" * 30):
        molecule = Chem.MolFromSmiles(smiles)
        heavy = sum(atom.GetAtomicNum() > 1 for atom in molecule.GetAtoms())
        assert _heavy_atoms(CalcMolFormula(molecule)) == heavy, smiles


def test_scaffolds():
    pytest.importorskip("rdkit")
    assert _scaffold("c1ccccc1Br") == _scaffold("CCOC(=O)c1ccccc1") == "c1ccccc1"
    assert _scaffold("Cc1ccc(CC2CC2)cc1") == "c1ccc(CC2CC2)cc1"  # what links rings belongs to it
    assert _scaffold("C[C@H]1CCN(C)C1") == _scaffold("C1CCNC1")  # whatever the stereochemistry
    assert _scaffold("CCCO") == _scaffold("CCC=O") == _scaffold("CC[NH2+]C") == _scaffold("C#CSF") == "CCCC"
    assert _scaffold("CCC[O-]") == _scaffold("CCC[OH2+]") == "CCCC"  # whatever hydrogens the atom was written with
    assert _scaffold("C1CC[C@@H]2CCCC[C@H]2C1") == _scaffold("C1CC[C@@H]2CCCC[C@@H]2C1") == _scaffold("C1CCC2CCCCC2C1")
    assert _scaffold("CC(C)O") == "CC(C)C"
    assert _scaffold("[13CH3]C") == _scaffold("CC") == "CC"
    assert _scaffold("FS(F)(F)(F)(F)F") is not None  # valences that carbon does not have
    assert _scaffold("not a molecule") is None


def test_scaffolds_are_held_out_whole(package):
    pytest.importorskip("rdkit")
    seen, parts = {}, {}
    for seed in range(6):
        for split in ("train", "validation", "test"):
            try:
                source = build(package, names="common", split=split, seed=seed, validation=0.3, test=0.3)
            except ConfigError as error:
                assert f"no molecule falls in '{split}'" in str(error)  # noqa: PT017
                continue
            for number, smiles in zip(source._ids, source.column("smiles"), strict=True):
                seen.setdefault(seed, []).append(number)
                scaffold = _scaffold(smiles) or number
                assert parts.setdefault((seed, scaffold), split) == split
                assert scaffold != "c1ccccc1" or split == "train"
    assert all(sorted(ids) == sorted(set(ids)) and len(ids) == 6 for ids in seen.values())
    assert len({tuple(sorted((k[1], v) for k, v in parts.items() if k[0] == seed)) for seed in range(6)}) > 1


def test_an_absent_package_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="`pip install chemicals`"):
        build(tmp_path)


def test_the_fingerprint_follows_config_and_files(package):
    before = build(package).fingerprint()
    assert build(package).fingerprint() == before != build(package, limit=2).fingerprint()
    files(package, {"Phase Change/Yaws Boiling Points.tsv": "CAS\tTb\n"})
    assert build(package).fingerprint() != before


@pytest.mark.slow
def test_the_real_molecules():
    pytest.importorskip("rdkit")
    start = time.perf_counter()
    try:
        everything = Molecules(MoleculesConfig(split="all", synonyms=3))
    except ConfigError:
        pytest.skip("chemicals is not installed")
    assert time.perf_counter() - start < 10
    assert len(everything) == len(set(everything.column("common"))) == 13188
    caffeine = everything._ids.index("RYYVLZVUVIJVGH")
    assert everything[caffeine].fields["name"][0] == "caffeine"
    assert everything[caffeine].fields["formula"] == "C8H10N4O2"
    assert sum(value is not None for value in everything.column("boiling_point")) == 3051
    assert len(Molecules(MoleculesConfig(split="all", names="common", salts=True))) == 71572
    parts = [Molecules(MoleculesConfig(split=part)) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [10152, 998, 2038]
    scaffolds = [{_scaffold(smiles) for smiles in part.column("smiles")} - {None} for part in parts]
    assert sum(map(len, scaffolds)) == len(set().union(*scaffolds))
