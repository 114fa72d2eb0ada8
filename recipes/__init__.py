"""The library's recipes, as YAML files. `mmrep list recipes` names them, `mmrep cp NAME .` copies one."""

if __name__ != "mmrep.recipes":
    raise ImportError("import mmrep.recipes, not recipes: this folder is a part of the package mmrep")
