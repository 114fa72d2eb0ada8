"""Real data sets that package registries install: no hub, no download of ours, and nothing of them ships with mmrep."""
