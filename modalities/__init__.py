"""One folder per modality; each registers into the core through entry points, and none imports another."""

if __name__ != "mmrep.modalities":
    raise ImportError("import mmrep.modalities, not modalities")
