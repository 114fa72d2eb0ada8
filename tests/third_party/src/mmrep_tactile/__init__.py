"""Touch for mmrep: frames of a pressure sensor."""
